"""xr0 verify: a folder's cases, one after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xr0_engine.backend import resolve_backend, resolve_device, resolve_dtype
from xr0_engine.comparison import Comparison, compare
from xr0_engine.files import read_json, reading
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import without_dependent_launch
from xr0_engine.fused.tactics import TacticTable, tactics_for
from xr0_engine.golden.cases import check_case, chunk_inputs, golden_config, golden_inputs, load_case
from xr0_engine.golden.losses import golden_flow, golden_turn, verify_joint_training, verify_training
from xr0_engine.golden.seeded import told_way, verify_seeded
from xr0_engine.model.network import Network
from xr0_engine.model.weights import load_model, read_headers
from xr0_engine.types import CheckpointError, FileError, KVBlock, ModelInputs

TABLE = "table"
WAYS: dict[str, dict[str, Any]] = {
    TABLE: {},
    "chained": {"flow": "chained", "overlap": False},
    "layered": {"flow": "layered", "overlap": False},
    "persistent": {"flow": "persistent", "overlap": False},
    "streamed": {"flow": "streamed", "overlap": False},
    "overlap": {"overlap": True},
    "separate": {"flow": "chained", "overlap": False},
}
"""How the flow runs: as this GPU's tactic table has it; as a chain of kernels; as one kernel a layer; as one kernel;
as one whose weights stream;
with its first step beside the VLM's last layers; as a chain of kernels, none of which starts before the one ahead of it
has ended."""


def verify_folder(folder: Path, backend: str, device: str, dtype: str, way: str = TABLE) -> Iterator[Comparison]:
    """Compare every case, one after the other.

    way: of WAYS, in which a backend with kernels of its own runs the flow. Raises ValueError for a folder without cases
    or with broken ones and for a wrong way, NotImplementedError for one that this machine lacks.
    """
    precision, target = resolve_dtype(dtype), resolve_device(device)
    backend = resolve_backend(backend, target)
    _check_way(way, backend, target)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    models = sorted(path for path in folder.glob("*.json") if path.with_suffix(".weights.safetensors").is_file())
    scripts = sorted(path for path in folder.glob("*.py") if path.with_suffix(".safetensors").is_file())
    if not models and not scripts:
        raise ValueError(
            f"{folder} holds no golden cases: neither <model>.json with weights, nor <name>.py with results"
        )
    with without_dependent_launch() if way == "separate" else nullcontext():
        for path in models:
            yield from _verify_model(path, backend, target, precision, way)
        for path in scripts:
            yield from verify_seeded(path, backend, target, precision, _table(target, way))


def _check_way(way: str, backend: str, device: torch.device) -> None:
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}; got {way!r}")
    if way != TABLE and backend == "reference":
        raise ValueError(f"way: backend 'reference' has one way alone, got {way!r}")
    if way == "overlap" and device.type != "cuda":
        raise NotImplementedError(f"way 'overlap': it takes two streams of a CUDA GPU, and the device is {device}")


def _table(device: torch.device, way: str) -> TacticTable:
    return replace(tactics_for(device), **WAYS[way])


def _verify_model(path: Path, backend: str, device: torch.device, dtype: torch.dtype, way: str) -> Iterator[Comparison]:
    golden = read_json(path)
    with reading(path):
        config = golden_config(golden)
    weights = path.with_suffix(".weights.safetensors")
    stored, faults = read_headers([weights])
    if faults:
        raise CheckpointError("; ".join(faults))
    plain = load_model(config, stored, device, dtype)
    network: Network = plain
    if backend != "reference":
        network = FusedModel(plain, backend, _table(device, way), device.type == "cuda")
    for file in sorted(path.parent.glob(f"{path.stem}.*.safetensors")):
        if file == weights:
            continue
        case = load_case(file)
        with reading(file, FileError):
            check_case(case, config)
        inputs = golden_inputs(case, config)
        kv = yield from _verify_stages(file.stem, network, inputs, case, dtype)
        if backend != "reference":
            chunk = network.step(inputs, *chunk_inputs(case, case["prefix"])).clone()
            assert isinstance(network, FusedModel)
            ran = told_way(network.table.flow, network.session(inputs).way)
            yield compare(file.stem, f"actions, one step{ran}", chunk, case["actions"], dtype)
            if device.type == "cuda":
                again = network.step(inputs, *chunk_inputs(case, case["prefix"]))
                yield Comparison(file.stem, "actions, replayed", float((again - chunk).abs().max()), 0.0, "max")
        elif "train.loss_with_freq" in case:
            yield from verify_training(file.stem, plain.head, kv, case, dtype)
        elif "train.loss_choice" in case:
            with reading(path):
                flow, tokens = golden_flow(golden["training"]), golden["tokens"]
            with reading(file, FileError):
                turn = golden_turn(case, tokens, config.text.vocab_size)
            yield from verify_joint_training(file.stem, config, flow, stored, case, turn, device, dtype)


def _verify_stages(
    name: str, network: Network, inputs: ModelInputs, case: dict[str, Tensor], dtype: torch.dtype
) -> Generator[Comparison, None, KVBlock]:
    vision = network.encode_images(inputs)
    kv = network.prefill(inputs, vision)
    is_token = inputs.attention_mask[:, None, :, None]
    layers = range(len(kv.keys))
    expected_kv = torch.stack([case[f"kv.{layer}.{part}"] * is_token for part in ("key", "value") for layer in layers])
    actual_kv = torch.cat((kv.keys, kv.values)).cpu() * is_token
    trace: list[Tensor] = []
    actions = network.sample(kv, case["state"], *chunk_inputs(case, case["prefix"]), trace).cpu()
    yield compare(name, "vision tokens", vision.tokens, case["vision_tokens"], dtype)
    yield compare(name, "KV block", actual_kv, expected_kv, dtype)
    yield compare(name, "flow trace", torch.stack(trace), case["flow_trace"], dtype)
    yield compare(name, "actions", actions, case["actions"], dtype)
    return kv
