"""Exported graphs as engines of TensorRT for RTX, for GPUs that need not be here, or of plain TensorRT for this one."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from xr0_engine.export.layers import parse_layers, summarise
from xr0_engine.exported.integrity import remember
from xr0_engine.exported.manifest import MANIFEST_FILE, EngineManifest, Manifest, changed_files, record_files, sha256
from xr0_engine.exported.tensorrt_stage import load_library, make_logger
from xr0_engine.whole import whole_folder

TARGETS = {"rtx4090": "8.9", "rtx5090": "12.0", "a100": "8.0"}
"""Target -> compute capability; `local` is the GPU that is here."""
LOCAL = "local"
FLOAT8_CAPABILITY = 8.9
"""From which compute capability on GPUs multiply float8."""
STAGES = ("vision", "prefill", "flow")
TIMING_CACHE = "timing.cache"
MEMINFO = Path("/proc/meminfo")
MEMORY_BASE = 2**30
MEMORY_PER_WEIGHT = 1.7
MEMORY_PER_OPERATOR = 3 * 2**17
"""Memory that building takes, in bytes, pages of files apart: libraries, for every byte of weights, and for every
operator of the graph. A flow of five steps has few weights and thousands of operators (docs/export.md)."""


def build_engines(
    folder: Path, target: str, builder: str = "tensorrt-rtx", stages: Sequence[str] = STAGES
) -> EngineManifest:
    """Build the stages of an export into folder/target, which appears whole or not at all.

    builder: tensorrt-rtx builds for any target; tensorrt only for `local`. Raises ValueError for a wrong argument or
    folder, NotImplementedError for a target that the builder cannot build for from here or that has not what the graphs
    hold, RuntimeError for a missing library or GPU, or if the builder fails, with its reason.
    """
    if target not in (*TARGETS, LOCAL):
        raise ValueError(f"target: expected {', '.join(TARGETS)} or {LOCAL}; got {target!r}")
    if builder == "tensorrt" and target != LOCAL:
        raise NotImplementedError(
            f"builder tensorrt builds on the GPU that it builds for: run it there with --target {LOCAL}, or use "
            "--builder tensorrt-rtx"
        )
    manifest = Manifest.read(folder)
    graphs = {key: name for key, name in manifest.stages.items() if key.partition(".")[0] in stages}
    missing = [stage for stage in stages if not any(key.partition(".")[0] == stage for key in graphs)]
    if missing or not graphs:
        raise ValueError(f"stages: {folder} holds {', '.join(manifest.stages)}; got {', '.join(missing) or 'none'}")
    out = folder / target
    if out.exists():
        raise ValueError(f"{out} exists; remove it to build again")
    library = load_library(builder)
    changed = changed_files(manifest.located(folder))
    if changed:
        raise ValueError(f"{folder}: missing or changed since they were written: {', '.join(changed)}")
    capability = TARGETS.get(target) or _local_capability()
    if float(capability) < FLOAT8_CAPABILITY and (name := _with_float8(folder, graphs.values())) is not None:
        raise NotImplementedError(
            f"{folder / name} holds float8, which GPUs have from compute capability {FLOAT8_CAPABILITY} on; "
            f"{target} has {capability}: export a checkpoint of recipe int8 or int8-all"
        )
    sizes = {key: graph_size(folder / name) for key, name in graphs.items()}
    _check_memory(max(expected_memory(*size) for size in sizes.values()))
    with whole_folder(out, sum(weights for weights, _ in sizes.values())) as partial:
        # TensorRT for RTX times nothing here: it chooses kernels on the GPU, when the engine is first run.
        cache = partial / TIMING_CACHE
        if builder == "tensorrt":
            cache.touch()
        facts = {}
        for key, name in graphs.items():
            build = _Build(library, builder, folder / name, None if target == LOCAL else capability)
            facts[key] = build.run(partial, key, cache)
        engines = EngineManifest(
            builder=builder,
            builder_version=library.__version__,
            target=target,
            compute_capability=capability,
            export_sha256=sha256(folder / MANIFEST_FILE),
            stages={key: f"{key}.engine" for key in graphs},
            facts=facts,
            files=record_files(partial, [path.name for path in partial.iterdir()]),
        )
        engines.write(partial)
    remember(engines.located(out))
    return engines


class _Build:
    """One graph to one engine. capability: None for the GPU that is here."""

    def __init__(self, library: Any, builder: str, graph: Path, capability: str | None) -> None:
        self._library, self._builder, self._graph, self._capability = library, builder, graph, capability
        self._log: list[str] = []
        self._errors: list[str] = []
        self._logger = make_logger(library)
        self._logger.sink = self._take

    def run(self, folder: Path, key: str, cache: Path) -> dict[str, Any]:
        """Write the engine and its layers; returns the facts of EngineManifest."""
        begin, begin_cpu = time.perf_counter(), time.process_time()
        library = self._library
        builder = library.Builder(self._logger)
        network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = library.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(self._graph)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            faults = [f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors]
            raise RuntimeError(f"{self._graph}: the builder cannot read it: {'; '.join(faults)}")
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == library.LayerType.ATTENTION_INPUT:
                # Fused where the target has a kernel for its shape, else several kernels instead of an error.
                layer.__class__ = library.IAttentionInputLayer
                layer.attention.decomposable = True
        config = self._config(builder, cache)
        path = folder / f"{key}.engine"
        with path.open("wb") as file:
            # Not in memory first: an engine is as large as its weights.
            if not builder.build_serialized_network_to_stream(network, config, _writer(library, file)):
                raise self._failed("no engine")
        if self._builder == "tensorrt":
            cache.write_bytes(config.get_timing_cache().serialize())
        layers, summary = self._layers(path)
        (folder / f"{key}.layers.json").write_text(json.dumps(layers, indent=1), encoding="utf-8")
        return {
            "build_s": round(time.perf_counter() - begin, 1),
            "build_cpu_s": round(time.process_time() - begin_cpu, 1),
            "engine_bytes": path.stat().st_size,
            # Of the process so far, weights that it maps from their file among them.
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "layers": summary,
        }

    def _config(self, builder: Any, cache: Path) -> Any:
        library = self._library
        config = builder.create_builder_config()
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        # float32 means float32, as in the reference engine.
        config.clear_flag(library.BuilderFlag.TF32)
        if self._builder == "tensorrt":
            config.set_timing_cache(config.create_timing_cache(cache.read_bytes()), ignore_mismatch=False)
        if self._capability is not None:
            config.num_compute_capabilities = 1
            name = "SM" + self._capability.replace(".", "")
            config.set_compute_capability(getattr(library.ComputeCapability, name), 0)
        return config

    def _layers(self, path: Path) -> tuple[Any, Mapping[str, Any]]:
        if self._builder == "tensorrt-rtx":
            layers = parse_layers(self._log)
            return [asdict(layer) for layer in layers], summarise(layers)
        runtime = self._library.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._failed("an engine that does not load")
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(self._library.LayerInformationFormat.JSON)
        return json.loads(text), {"count": engine.num_layers}

    def _failed(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self._graph}: the builder made {what}: {'; '.join(self._errors) or 'no reason given'}")

    def _take(self, severity: Any, message: str) -> None:
        if severity <= self._library.ILogger.Severity.ERROR:
            self._errors.append(message)
        elif message.startswith("Layers:\n"):
            self._log.append(message)


def graph_size(path: Path) -> tuple[int, int]:
    """Bytes of the weights that a graph takes from its file, and how many operators it has."""
    graph = onnx.load(path, load_external_data=False).graph
    lengths = (entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length")
    return sum(int(entry.value) for entry in lengths), len(graph.node)


def _with_float8(folder: Path, names: Iterable[str]) -> str | None:
    """The first graph that holds float8."""
    kind = onnx.TensorProto.FLOAT8E4M3FN
    loaded = ((name, onnx.load(folder / name, load_external_data=False).graph) for name in names)
    return next((name for name, graph in loaded if any(each.data_type == kind for each in graph.initializer)), None)


def expected_memory(weights: int, operators: int) -> int:
    """Bytes that building an engine takes, of a graph_size."""
    return MEMORY_BASE + int(MEMORY_PER_WEIGHT * weights) + MEMORY_PER_OPERATOR * operators


def _check_memory(needed: int) -> None:
    """Raises RuntimeError if a build that takes so many bytes would run out of memory."""
    available = _available_memory()
    if available is not None and available < needed:
        raise RuntimeError(
            f"building takes about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free: build on "
            "a machine with more (no GPU is needed), or other stages (--stage)"
        )


def _available_memory() -> int | None:
    """Bytes that the system can give without swapping; None where it does not tell."""
    if not MEMINFO.is_file():
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text(encoding="utf-8"))
    return None if found is None else int(found[1]) * 1024


def _writer(library: Any, file: BinaryIO) -> Any:
    """What the builder streams an engine to."""

    class Writer(library.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _local_capability() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"target {LOCAL}: torch finds no CUDA GPU here; name the target: {', '.join(TARGETS)}")
    return "{}.{}".format(*torch.cuda.get_device_capability())
