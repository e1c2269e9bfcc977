"""The GPU kernels' self-check: stages of small models by our kernels, against PyTorch, on the machine that is to run.

`python -m xr0_engine.fused.selfcheck` checks one model and tells what it does line by line; choice.py runs it as a
process of its own. An illegal address, a hang or an abort of the compiler then ends that process and no engine, the
stage it was in is known, and nothing of it stays on the GPU. It runs before a checkpoint is loaded, and reads the first
layers of it from its files, so that the engine's own weights are neither folded nor copied.

Two models: a seeded one, with every feature that the network has in the least size; and the checkpoint's own first
layers, at its sizes and with its values. Each runs op by op and as the engine will (CUDA graph, persistent or
overlapped flow), and again after another input and at once: bit by bit the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from xr0_engine.backend import resolve_dtype
from xr0_engine.comparison import FLOAT32_MAX_ERROR, Comparison
from xr0_engine.config import ActionHeadConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.prompts import left_padded, session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable, stated_defaults, tactics_for
from xr0_engine.model.quantization import Formats, formatted_layers, quantized_layers, read_quantization
from xr0_engine.model.weights import allocated, fillings, inference_shapes, read_index
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.robot.preprocess import position_ids
from xr0_engine.types import ModelInputs, VisionTokens

FACTOR = 3
"""The kernels may be so many times as wrong as PyTorch in the same precision, both against float32 on the CPU. Over 100
seeded models in each of bfloat16 and float16 their oracles came to 1.5 times at most, compiled kernels in emulation to
1.1; a kernel alone is held to twice. In 8 bits, whose rounding of rows is in what PyTorch is wrong by, the oracles came
to 1.74 times at most over 30 models in each of four recipes. A window one wider is 8 times in bfloat16; a prefix or
image token one off, or a fold that is missing, is 50 times or more."""
FLOOR_ROUNDOFFS = 2
"""bfloat16 and float16: no less than so many unit roundoffs of the type, should PyTorch be right by chance."""
VOCABULARY = 1024
"""Rows of the checkpoint's embedding table that are read, the last one in the image token's place."""
MARK = "xr0-selfcheck "
"""How a line begins that the process tells; what compilers and drivers print goes past it."""
WHOLE = "16"
"""In the place of a format: layers are not in 8 bits."""
NOT_FINITE = "PyTorch's own values are not finite"

Tell = Callable[[str], None]
Numbers = Mapping[str, Tensor]
"""Quantity, in the order in which they are computed -> float32 on the CPU."""


@dataclass(frozen=True)
class Case:
    """One call of a step. noise, prefix: (B, T, A); prefix_length: (B,)."""

    name: str
    inputs: ModelInputs
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor

    @property
    def chunk(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.noise, self.prefix, self.prefix_length


def check(
    model: XR0Model, sessions: list[list[Case]], backend: str, table: TacticTable, tell: Tell = lambda stage: None
) -> Iterator[Comparison]:
    """Compare every stage of a model, in the order of its work, and stop at nothing.

    model: on the device and in the precision that are checked; its norms are folded afterwards. sessions: cases that
    share buffers and a graph. tell: called with what comes next. Raises NotImplementedError for a model that the
    kernels do not have, ValueError if PyTorch's own values are not finite, and what kernels and drivers raise.
    """
    tell("PyTorch")
    cases = [case for session in sessions for case in session]
    exact_model = _exact(model)
    exact = {case.name: _by_stages(exact_model, case) for case in cases}
    plain = {case.name: _by_stages(model, case) for case in cases}
    for name, numbers in plain.items():
        for quantity, value in numbers.items():
            if not bool(value.isfinite().all() and exact[name][quantity].isfinite().all()):
                raise ValueError(f"{name}: {quantity}: {NOT_FINITE} in {model.dtype}: there is nothing to compare with")

    fused = FusedModel(model, backend, table, graphs=model.device.type == "cuda")

    def judged(case: Case, how: str, numbers: Numbers) -> Iterator[Comparison]:
        for quantity, value in numbers.items():
            given = (value, plain[case.name][quantity], exact[case.name][quantity])
            yield judge(f"{case.name}, {how}", quantity, *given, model.dtype)

    for held in sessions:
        for how, way, graphs in _ways(fused):
            tell(f"{held[0].name}, {how}")
            session = Session(fused, session_key(held[0].inputs), held[0].inputs, way, graphs)
            found = []
            for case in held:
                tell(f"{case.name}, {how}")
                session.update(case.inputs, *case.chunk)
                found.append(_replayed(session, case))
                yield from judged(case, how, found[-1])
            for when in ("again after another input", "again at once")[len(held) == 1 :]:
                tell(f"{held[0].name}, {how}, {when}")
                session.update(held[0].inputs, *held[0].chunk)
                yield _same(f"{held[0].name}, {how}, {when}", _replayed(session, held[0]), found[0])
            session.close()
        how = "kept KV block"
        tell(f"{held[0].name}, {how}")
        yield from judged(held[0], how, _by_stages(fused, held[0]))


def judge(case: str, quantity: str, ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> Comparison:
    """ours against exact, allowed FACTOR times what plain is wrong."""
    floor = FLOAT32_MAX_ERROR if dtype == torch.float32 else FLOOR_ROUNDOFFS * torch.finfo(dtype).eps / 2
    allowed = max(FACTOR * worst(plain, exact), floor)
    return Comparison(case, quantity, worst(ours, exact), allowed, "relative RMS of the worst row or column")


def worst(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over the row or column that is most wrong, over that of all values.

    One wrong row or column among thousands, as a tile's edge gives, drowns in the mean of all.
    """
    squares = (actual - exact).flatten(0, -2).square()
    most = torch.stack((squares.mean(1).max(), squares.mean(0).max())).max()
    return float((most / exact.square().mean()).sqrt())


def seeded_config() -> ModelConfig:
    """The least sizes that have every part: grouped heads of both attentions, DeepStack, layers that the DiT reads not,
    a window, more than one tile of columns and of what is summed."""
    return ModelConfig(
        text=TextConfig(256, 128, 4, 4, 2, 32, 192, 1e-6, 5_000_000.0, (6, 5, 5)),
        vision=VisionConfig(2, 64, 2, 128, 128, 8, 2, 2, 3, 36, (0, 1)),
        head=ActionHeadConfig(
            128, 3, 32, 2, 1, 32, 10, 32, flow_steps=2, local_window=3, position_offset=10
        ),
        tokens=TokenIds(image=255, vision_start=254, vision_end=253),
    )  # fmt: skip


def seeded_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0, formats: Formats = (None, None)
) -> XR0Model:
    """Weights that keep activations at their size, and norms far from one: a fold that is forgotten shows. formats: in
    8 bits, of the VLM's layers and of the head's."""
    shapes = inference_shapes(config)
    model = allocated(config, device, dtype, formatted_layers(formats, shapes))
    generator = torch.Generator().manual_seed(seed)
    for name, fill in fillings(model).items():
        value = torch.randn(shapes[name], generator=generator)
        if value.ndim > 1:
            value /= value[0].numel() ** 0.5
        else:
            value = 0.3 * value + float("norm" in name and name.endswith("weight"))
        fill(value)
    model.finish_loading()
    return model


def first_layers(config: ModelConfig) -> ModelConfig:
    """A checkpoint's sizes with two vision blocks, each tapped, three text layers and two of the action head."""
    text, vision, head = config.text, config.vision, config.head
    layers, depth = min(3, text.num_layers), min(2, vision.depth)
    return replace(
        config,
        text=replace(text, num_layers=layers, vocab_size=min(VOCABULARY, text.vocab_size)),
        vision=replace(vision, depth=depth, deepstack_layers=tuple(range(min(depth, len(vision.deepstack_layers))))),
        head=replace(head, num_layers=min(2, head.num_layers)),
        tokens=replace(config.tokens, image=min(VOCABULARY, text.vocab_size) - 1),
    )


def checkpoint_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    recipe: str | None = None,
    described_by: Path | None = None,
) -> XR0Model:
    """first_layers of a checkpoint whose tensors were checked. recipe: by which one in 16 bits is quantised.
    described_by: the folder whose config.json says how it runs; None: its own."""
    config, quantization = first_layers(ModelConfig.load(described_by or folder)), read_quantization(folder)
    shapes = inference_shapes(config)
    layers = quantized_layers(recipe, shapes) if recipe else {}
    if quantization is not None:
        layers = {layer: f for layer, f in quantization.layers.items() if f"{layer}.weight" in shapes}
    model, stored = allocated(config, device, dtype, layers), read_index(folder, quantization is not None)
    for name, fill in fillings(model, stored).items():
        rows = shapes.get(name, shapes[name.removesuffix("_scale")])[0]
        with safe_open(stored[name].file, framework="pt") as handle:
            fill(handle.get_slice(stored[name].key)[:rows])
    model.finish_loading()
    return model


def seeded_sessions(config: ModelConfig) -> list[list[Case]]:
    """Two prompts of one bucket behind a kept preamble, with pictures of two sizes; two padded rows of a longer bucket,
    with pictures that move."""
    merge, length = config.vision.spatial_merge_size, config.head.action_length
    low, high = (2 * merge, 2 * merge), (2 * merge, 4 * merge)
    return [
        [
            make_case(config, "one row", [[low, high]], [[3, 2, 5]], [0], 0),
            make_case(config, "one row, prefix", [[low, high]], [[5, 2, 7]], [length // 3], 1),
        ],
        [
            make_case(
                config, "two rows", [[low], [low]], [[29, 12], [5, 2]], [1, length - 1], 2, preamble=0, moving=True
            )
        ],
    ]


def checkpoint_sessions(config: ModelConfig) -> list[list[Case]]:
    """Two calls with two cameras, of 64 and 24 tokens."""
    merge = config.vision.spatial_merge_size
    views = [[(8 * merge, 8 * merge), (4 * merge, 6 * merge)]]
    prefix = min(config.head.max_prefix, config.head.action_length - 1)
    return [
        [
            make_case(config, "first layers", views, [[6, 3, 20]], [0], 0),
            make_case(config, "first layers, prefix", views, [[6, 3, 12]], [prefix], 1),
        ]
    ]


def make_case(
    config: ModelConfig,
    name: str,
    views: list[list[tuple[int, int]]],
    texts: list[list[int]],
    prefix_length: list[int],
    seed: int,
    preamble: int = 4,
    moving: bool = False,
) -> Case:
    """Per row: views' grids in patches, tokens of text before, between and behind them, and its prefix's length. The
    first `preamble` tokens are the same in every row and case. moving: a patch has all of its frames, not one."""
    rng, head, image = np.random.default_rng(seed), config.head, config.tokens.image
    merge = config.vision.spatial_merge_size
    words = image - 3
    common = np.random.default_rng(0).integers(0, words, preamble)
    prompts = []
    for grids, lengths in zip(views, texts, strict=True):
        parts = [common, rng.integers(0, words, lengths[0])]
        for (height, width), tokens in zip(grids, lengths[1:], strict=True):
            parts += [np.full(height * width // merge**2, image), rng.integers(0, words, tokens)]
        prompts.append(np.concatenate(parts))
    batch, longest = len(prompts), max(map(len, prompts))
    ids, mask = np.zeros((batch, longest), np.int64), np.zeros((batch, longest), bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, True
    all_grids = tuple(grid for row in views for grid in row)
    positions = [position_ids(*row, image, merge) for row in zip(ids, mask, views, strict=True)]

    def pixels() -> Tensor:
        # As in pictures, a pixel is much like the next one: the kernels' weights are rounded for that.
        patches = sum(height * width for height, width in all_grids)
        columns = config.vision.patch_dim if moving else config.vision.frame_dim
        values = rng.uniform(-1, 1, (patches, 1)) + 0.1 * rng.standard_normal((patches, columns))
        return torch.from_numpy(values.clip(-1, 1).astype(np.float32))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    chunk = (batch, head.action_length, head.action_dim)
    action_mask = torch.ones(chunk)
    action_mask[..., -1:] = 0
    inputs = ModelInputs(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        pixel_values=pixels(),
        image_grids=all_grids,
        position_ids=torch.from_numpy(np.stack(positions, axis=1)),
        preamble_length=preamble,
        state=normal(batch, head.state_length, head.state_dim),
        action_mask=action_mask,
    )
    return Case(name, inputs, normal(*chunk), normal(*chunk), torch.tensor(prefix_length))


def main() -> None:
    """Tells {"stage": ...} before each, {"comparison": ...} after it, then {"refused": why} or {"done": true}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--described-by", type=Path)
    parser.add_argument("--quantize")
    parser.add_argument("--formats", nargs=2, default=(WHOLE, WHOLE))
    parser.add_argument("--stated-defaults", action="store_true")
    given = parser.parse_args()
    device, dtype = torch.device(given.device), resolve_dtype(given.dtype)

    def tell(**line: object) -> None:
        print(MARK + json.dumps(line), flush=True)

    table = stated_defaults(device) if given.stated_defaults else tactics_for(device)
    tell(stage="loading")
    if given.checkpoint is None:
        vlm, head = (None if format == WHOLE else format for format in given.formats)
        model = seeded_model(seeded_config(), device, dtype, formats=(vlm, head))
        sessions = seeded_sessions(model.config)
    else:
        model = checkpoint_model(given.checkpoint, device, dtype, given.quantize, given.described_by)
        sessions = checkpoint_sessions(model.config)
    try:
        for comparison in check(model, sessions, "triton", table, lambda stage: tell(stage=stage)):
            tell(comparison=asdict(comparison))
    except NotImplementedError as error:
        tell(refused=str(error))
    else:
        tell(done=True)


def _exact(model: XR0Model) -> XR0Model:
    """The same weights in float32 on the CPU, whose arithmetic owes nothing to the GPU; rows are not rounded: a value
    between two of 8 bits falls to either side by its last bit."""
    exact, given = allocated(model.config, torch.device("cpu"), torch.float32), dict(model.named_parameters())
    for name, target in exact.named_parameters():
        value, scale = given[name].cpu().float(), given.get(f"{name}_scale")
        target.data.copy_(value if scale is None else value * scale.cpu()[:, None])
    exact.finish_loading()
    return exact


def _ways(fused: FusedModel) -> Iterator[tuple[str, TacticTable, bool]]:
    """Name, table, whether with graphs: op by op as a chain, and as the engine runs it where that is something else."""
    table = fused.table
    yield "op by op", replace(table, flow="chained", overlap=False), False
    words = ["CUDA graph"] * fused.graphs + [f"{table.flow} flow"] * (table.flow != "chained")
    words += ["overlapped flow"] * (table.overlap and fused.graphs)
    if words:
        yield " and ".join(words), table, fused.graphs


@torch.inference_mode()
def _replayed(session: Session, case: Case) -> Numbers:
    """What a replay leaves, in buffers whose values before are of no use."""
    for buffer in (session.chunk, session.vision.tokens, *session.vision.deepstack):
        buffer.fill_(torch.nan)
    session.replay()
    vision = VisionTokens(session.vision.tokens[0], tuple(tap[0] for tap in session.vision.deepstack))
    mask = case.inputs.attention_mask.to(session.chunk.device)
    keys, values = (left_padded(cache, mask) for cache in (session.flow_inputs.keys, session.flow_inputs.values))
    return _numbers(session.model.config, vision, keys, values, session.chunk)


def _by_stages(network: XR0Model | FusedModel, case: Case) -> Numbers:
    vision = network.encode_images(case.inputs)
    kv = network.prefill(case.inputs, vision)
    chunk = network.sample(kv, case.inputs.state, *case.chunk)
    shown = kv.mask[None, :, None, :, None]
    # Not a product: what padding holds may be anything.
    keys, values = (cache.masked_fill(~shown, 0) for cache in (kv.keys, kv.values))
    return _numbers(network.config, vision, keys, values, chunk)


def _numbers(config: ModelConfig, vision: VisionTokens, keys: Tensor, values: Tensor, chunk: Tensor) -> Numbers:
    found = {
        f"DeepStack tap {number} (vision block {block})": tap
        for number, (block, tap) in enumerate(zip(config.vision.deepstack_layers, vision.deepstack, strict=True))
    }
    found["vision tokens"] = vision.tokens
    for layer, pair in enumerate(zip(keys, values, strict=True), config.first_read_layer):
        found |= {f"KV {name} of text layer {layer}": part for name, part in zip(("keys", "values"), pair, strict=True)}
    found["action chunk"] = chunk
    return {quantity: value.float().cpu().clone() for quantity, value in found.items()}


def _same(case: str, numbers: Numbers, first: Numbers) -> Comparison:
    """Bit by bit, NaN included. Names the first quantity that differs."""
    for quantity, value in numbers.items():
        if differing := int((value.view(torch.int32) != first[quantity].view(torch.int32)).sum()):
            return Comparison(case, quantity, differing, 0, "elements that differ")
    return Comparison(case, "everything", 0, 0, "elements that differ")


if __name__ == "__main__":
    main()
