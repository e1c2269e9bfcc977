"""Golden cases: run every one in a folder and measure how far this build is from it.

The folder's format: `<model>.json` sizes, `<model>.weights.safetensors` under checkpoint names,
`<model>.<case>.safetensors` inputs and expected results; and `<name>.safetensors` beside `<name>.py`, an action head of
published sizes whose weights and inputs the script makes from seeds, with results named
`<windowed|full>.prefix<P>.actions`. The scripts are executed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xr0_engine.backend import resolve_backend, resolve_device, resolve_dtype
from xr0_engine.checkpoint import published_config
from xr0_engine.comparison import FLOAT32_LOSS_ERROR, FLOAT32_SEEDED_MAX_ERROR, Comparison, compare, tolerance
from xr0_engine.config import ModelConfig
from xr0_engine.files import read_json, reading, refuse_pointer
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import FusedOps, without_dependent_launch
from xr0_engine.fused.prompts import bucket
from xr0_engine.fused.session import FlowSession
from xr0_engine.fused.tactics import TacticTable, tactics_for
from xr0_engine.model.dit import ActionHead, dit_geometry
from xr0_engine.model.flow import prefix_positions, training_pair
from xr0_engine.model.layers import pack_linears
from xr0_engine.model.network import Network
from xr0_engine.model.weights import head_shapes, load_model, read_headers
from xr0_engine.part_configs import POSITIONS
from xr0_engine.training.losses import error_weights, frequency_loss, mse_loss
from xr0_engine.types import CheckpointError, FileError, KVBlock, ModelInputs

TABLE = "table"
WAYS: dict[str, dict[str, Any]] = {
    TABLE: {},
    "chained": {"flow": "chained", "overlap": False},
    "layered": {"flow": "layered", "overlap": False},
    "persistent": {"flow": "persistent", "overlap": False},
    "overlap": {"overlap": True},
    "separate": {"flow": "chained", "overlap": False},
}
"""How the flow runs: as this GPU's tactic table has it; as a chain of kernels; as one kernel a layer; as one kernel;
with its first step beside the VLM's last layers; as a chain of kernels, none of which starts before the one ahead of it
has ended."""
CASE_SHAPES = {
    "input_ids": "BN",
    "attention_mask": "BN",
    "vlm_position_ids": "3BN",
    "image_grid_thw": "I3",
    "pixel_values": "PC",
    "state": "BSs",
    "noise": "BTA",
    "action_mask": "BTA",
    "prefix": "BpA",
    "vision_tokens": "VH",
    "flow_trace": "FBTA",
    "actions": "BTA",
}
TRAINING_SHAPES = {
    "train.action": "BTA",
    "train.t": "B11",
    "train.velocity": "BTA",
    "train.loss": "1",
    "train.loss_mse": "1",
    "train.loss_with_freq": "1",
}
"""Of a case: B batch, N tokens, I images, P patches, C columns of a patch, S states, s their columns, T actions, A
their columns, p those of the prefix, V image tokens, H hidden size, F flow steps and one, which may be others."""
WHOLE_NUMBERS = ("input_ids", "attention_mask", "vlm_position_ids", "image_grid_thw")
SEEDED_MODES = {"windowed": (4, 10), "full": (None, 0)}
SEEDED_RESULT = re.compile(r"(windowed|full)\.prefix(\d+)\.actions")


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
            yield from _verify_seeded(path, backend, target, precision, way)


def _check_way(way: str, backend: str, device: torch.device) -> None:
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}; got {way!r}")
    if way != TABLE and backend == "reference":
        raise ValueError(f"way: backend 'reference' has one way alone, got {way!r}")
    if way == "overlap" and device.type != "cuda":
        raise NotImplementedError(f"way 'overlap': it takes two streams of a CUDA GPU, and the device is {device}")


def _table(device: torch.device, way: str) -> TacticTable:
    return replace(tactics_for(device), **WAYS[way])


def golden_config(golden: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a golden model's JSON, which names some fields otherwise than config.json."""
    head, text = golden["action_head"], golden["text_config"]
    dit = {
        "hidden_size": head["hidden_size"],
        "num_hidden_layers": head["num_layers"],
        "head_dim": head["head_dim"],
        "num_key_value_heads": head["num_kv_heads"],
        "stream_norms": head.get("stream_norms", True),
        "output_width": head.get("output_hidden"),
    }
    rope = {"mrope_section": text["mrope_section"], "mrope_interleaved": text["mrope_interleaved"]}
    vlm = {
        **golden["tokens"],
        "text_config": {**text, "rope_scaling": rope},
        "vision_config": golden["vision_config"],
    }
    return ModelConfig.from_hf({**head, "vlm_config": vlm, "dit_config": dit})


def golden_inputs(case: Mapping[str, Tensor], config: ModelConfig) -> ModelInputs:
    ids, mask = case["input_ids"], case["attention_mask"].bool()
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    common, shortest = 0, min(map(len, rows))
    while common < shortest and len({row[common] for row in rows}) == 1 and rows[0][common] != config.tokens.image:
        common += 1
    return ModelInputs(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=case["pixel_values"],
        image_grids=tuple((int(height), int(width)) for _, height, width in case["image_grid_thw"]),
        position_ids=case["vlm_position_ids"],
        preamble_length=common,
        state=case["state"],
        action_mask=case["action_mask"],
    )


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
        case = _load(file)
        with reading(file, FileError):
            _check_case(case, config)
        inputs = golden_inputs(case, config)
        kv = yield from _verify_stages(file.stem, network, inputs, case, dtype)
        if backend != "reference":
            chunk = network.step(inputs, *_chunk_inputs(case, case["prefix"])).clone()
            yield compare(file.stem, "actions, one step", chunk, case["actions"], dtype)
            if device.type == "cuda":
                again = network.step(inputs, *_chunk_inputs(case, case["prefix"]))
                yield Comparison(file.stem, "actions, replayed", float((again - chunk).abs().max()), 0.0, "max")
        elif "train.loss" in case:
            yield from _verify_training(file.stem, plain.head, kv, case, dtype)


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
    actions = network.sample(kv, case["state"], *_chunk_inputs(case, case["prefix"]), trace).cpu()
    yield compare(name, "vision tokens", vision.tokens, case["vision_tokens"], dtype)
    yield compare(name, "KV block", actual_kv, expected_kv, dtype)
    yield compare(name, "flow trace", torch.stack(trace), case["flow_trace"], dtype)
    yield compare(name, "actions", actions, case["actions"], dtype)
    return kv


@torch.no_grad()
def _verify_training(
    name: str, head: ActionHead, kv: KVBlock, case: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[Comparison]:
    action, noise, prefix_length = case["train.action"], case["noise"], case["prefix"].shape[1]
    lengths = torch.full((len(action),), prefix_length)
    device = head.sink.weight.device
    z, target = training_pair(noise, action, case["train.t"], prefix_positions(lengths, action.shape[1]))
    geometry = dit_geometry(head.config, kv.next_position, kv.mask, lengths.to(device), action.shape[1])
    velocity = head(
        (z.to(device) * kv.action_mask).to(dtype),
        head.context(case["state"].to(device, dtype)),
        head.modulations(case["train.t"].flatten().to(device)),
        head.rope(geometry),
        geometry.mask,
        kv.keys,
        kv.values,
    ).cpu()
    suffix = slice(prefix_length, None)
    velocity, target, mask = velocity[:, suffix], target[:, suffix], case["action_mask"][:, suffix]
    yield compare(name, "velocity", velocity, case["train.velocity"][:, suffix], dtype)
    weights = torch.ones_like(mask)
    if prefix_length:
        given = _chunk_inputs(case, action[:, :prefix_length])
        generated = head.sample(kv, case["state"], *given, head.modulation_table()).cpu()
        l1_error = (generated - action)[:, suffix].abs()
        yield compare(name, "L1 error", l1_error, case["train.l1_error"], dtype)
        weights = error_weights(l1_error, mask)
    mse = mse_loss(velocity, target, mask, weights)
    frequency = frequency_loss(velocity, target, mask, weights, masked=False)
    actual = torch.stack((mse, 0.5 * mse, 0.5 * mse + frequency))
    expected = torch.cat([case[f"train.{loss}"] for loss in ("loss_mse", "loss", "loss_with_freq")])
    error = float(((actual - expected) / expected).abs().max())
    yield Comparison(name, "losses", error, tolerance(dtype, FLOAT32_LOSS_ERROR), "relative")


def _chunk_inputs(case: Mapping[str, Tensor], prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """noise and padded prefix, (B, T, A) each, and the prefix's lengths, (B,)."""
    noise = case["noise"]
    padded = torch.zeros_like(noise)
    padded[:, : prefix.shape[1]] = prefix
    return noise, padded, torch.full((len(noise),), prefix.shape[1])


@torch.inference_mode()
def _verify_seeded(
    path: Path, backend: str, device: torch.device, dtype: torch.dtype, way: str
) -> Iterator[Comparison]:
    script = _run_script(path)
    results = _load(path.with_suffix(".safetensors"))
    inputs = script.inputs()
    keys = torch.stack([key for key, _ in inputs["kv"]]).to(device, dtype)
    values = torch.stack([value for _, value in inputs["kv"]]).to(device, dtype)
    published = published_config()
    batch, tokens = keys.shape[1], keys.shape[3]
    with torch.device("meta"):
        head = ActionHead(published)
    head.load_state_dict(script.weights(head_shapes(head)), assign=True)
    head.to(device, dtype).requires_grad_(False)
    pack_linears(head)
    kv = KVBlock(
        keys=keys,
        values=values,
        mask=torch.ones(batch, tokens, dtype=torch.bool, device=device),
        next_position=torch.full((3, batch), tokens, device=device),
        action_mask=torch.ones_like(inputs["noise"], device=device),
    )
    for name, expected in sorted(results.items()):
        matched = SEEDED_RESULT.fullmatch(name)
        if matched is None:
            raise ValueError(f"{path.with_suffix('.safetensors')}: cannot tell what {name!r} is")
        window, offset = SEEDED_MODES[matched[1]]
        head.config = replace(published.head, local_window=window, position_offset=offset)
        prefix = torch.zeros_like(inputs["noise"])
        length = int(matched[2])
        prefix[:, :length] = inputs["prefix"][:, :length]
        lengths = torch.full((batch,), length)
        if backend == "reference":
            actions = head.sample(kv, inputs["state"], inputs["noise"], prefix, lengths, head.modulation_table())
        else:
            table = _table(device, way)
            ops, fused = FusedOps(backend, device, table.tactics), FusedHead(head)
            session = FlowSession(fused, ops, batch, bucket(tokens), prefix.shape[1], flow=table.flow)
            actions = session.sample(kv, inputs["state"], inputs["noise"], prefix, lengths)
        case = f"{path.stem}.{matched[1]}.prefix{length}"
        yield compare(case, "actions", actions, expected, dtype, FLOAT32_SEEDED_MAX_ERROR)


def _check_case(case: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises KeyError for a tensor that is missing, ValueError for one that is not as CASE_SHAPES has it, or whose
    values the model has no place for."""
    text, vision, head = config.text, config.vision, config.head
    sizes = {"1": 1, "3": 3, "S": head.state_length, "s": head.state_dim, "A": head.action_dim, "C": vision.patch_dim}
    sizes |= {"K": text.num_kv_heads, "D": text.head_dim, "H": text.hidden_size}
    shapes = {**CASE_SHAPES, **(TRAINING_SHAPES if "train.loss" in case else {})}
    if "train.loss" in case and "prefix" in case and case["prefix"].numel():
        shapes["train.l1_error"] = "BqA"
    shapes |= {f"kv.{layer}.{part}": "BKND" for layer in range(head.num_layers) for part in ("key", "value")}
    for name, letters in shapes.items():
        tensor = case[name]
        # What the configuration does not say, the first tensor that has it does.
        for letter, size in zip(letters, tensor.shape, strict=False):
            sizes.setdefault(letter, size)
        expected = [sizes[letter] for letter in letters if letter in sizes]
        if list(tensor.shape) != expected or (0 in expected and "p" not in letters):
            raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
        if tensor.is_floating_point() == (name in WHOLE_NUMBERS) or tensor.dtype == torch.bool:
            raise ValueError(f"{name}: got {tensor.dtype}")
    if sizes["p"] > sizes["T"]:
        raise ValueError(f"prefix: expected at most {sizes['T']} actions, got {sizes['p']}")
    if sizes.get("q", sizes["T"] - sizes["p"]) != sizes["T"] - sizes["p"]:
        raise ValueError(f"train.l1_error: expected {sizes['T'] - sizes['p']} actions, got {sizes['q']}")
    ids, grids, positions = case["input_ids"], case["image_grid_thw"], case["vlm_position_ids"]
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        raise ValueError(f"input_ids: expected ids from 0 below {text.vocab_size}")
    if positions.min() < 0 or positions.max() > POSITIONS[1]:
        raise ValueError(f"vlm_position_ids: expected 0 to {POSITIONS[1]}")
    merge, patches = vision.spatial_merge_size, sizes["P"]
    images = int((ids == config.tokens.image).sum()) * merge**2
    fits = grids.min() > 0 and bool((grids[:, 0] == 1).all()) and not bool((grids[:, 1:] % merge).any())
    if not fits or grids.max() > patches or int(grids.prod(1).sum()) != patches or images != patches:
        raise ValueError(f"image_grid_thw, input_ids: expected images of {patches} patches in all, as pixel_values has")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        refuse_pointer(path)
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from None


def _run_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
