"""What each optimisation buys here: the engine, and the engine without one of them, taking turns in one run.

The engine has no switches. Each variant is made of its own parts: subclasses of its modules that share its weights and
do one thing as the released code does. A variant must give the engine's actions before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import ratio_with_spread, run
from xr0_engine.engine import Engine
from xr0_engine.kernels import reference
from xr0_engine.model.dit import ActionHead, DiT, DiTAttention, DiTLayer, dit_geometry
from xr0_engine.model.flow import euler_sample, flow_times, prefix_positions
from xr0_engine.model.layers import PackedLinears, pack_linears
from xr0_engine.model.vision import VisionTower
from xr0_engine.model.vlm import LanguageModel, TextLayer
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.robot import patches
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.prompt import TOKENIZER_FILE, PromptTokenizer, normalize_instruction
from xr0_engine.types import ActionChunk, KVBlock, ModelInputs, VisionTokens

ENGINE = "engine"
GATE = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.15}
"""Relative RMS against the engine's actions. In 16 bits each variant rounds in its own places."""

Infer = Callable[[], list[ActionChunk]]
SomeModule = TypeVar("SomeModule", bound=nn.Module)


@dataclass(frozen=True)
class Variant:
    """The engine without one optimisation. stage: where it should tell; instead: what is done in its place."""

    stage: str
    instead: str
    infer: Infer


def variants(subject: Subject) -> dict[str, Variant]:
    """Optimisation -> the engine without it, for those that take effect on this machine."""
    engine, model = subject.engine, subject.engine.model
    assert isinstance(model, XR0Model)
    preprocess = Preprocessor.load(subject.folder)

    def of_model(variant: XR0Model) -> Infer:
        return replace(subject, engine=Engine(variant, preprocess, engine.backend)).infer

    tokenizer = FreshTokens(Tokenizer.from_file(str(subject.folder / TOKENIZER_FILE)), model.config.tokens)
    fresh = Preprocessor(model.config, tokenizer, engine.statistics)
    found = {
        "prompt tokens kept": Variant(
            "preprocess",
            "the prompt is tokenised in every call",
            replace(subject, engine=Engine(model, fresh, engine.backend)).infer,
        ),
        "position tables kept": Variant(
            "vision",
            "position embeddings and rotary tables of the images are made in every call",
            of_model(_twin(XR0Model, model, visual=_sharing(FreshTables, model.vlm.model.visual, model.config.vision))),
        ),
        "prompt head kept": Variant(
            "prefill", "the tokens before the first image are computed in every call", of_model(_twin(NoHead, model))
        ),
        "last layer K and V only": Variant(
            "prefill",
            "the last layer attends and runs its MLP, whose result nobody reads",
            of_model(_twin(XR0Model, model, language=_with_whole_last_layer(model))),
        ),
        "adaLN table at load": Variant(
            "flow", "the time MLP and the modulations are computed in every step", of_model(_twin(TimePerStep, model))
        ),
        "KV read where it lies": Variant(
            "flow",
            "every layer of every step joins the cached and its own keys and values",
            of_model(_twin(XR0Model, model, head=_with_joined_attention(model))),
        ),
    }
    if patches.native is None:
        found = {
            "native image path": Variant(
                "preprocess", "images become patches by Pillow and NumPy", _within(_numpy_patches, subject.infer)
            )
        } | found
    if model.device.type == "cuda":
        found["packed projections"] = Variant(
            "prefill", "Q, K, V, gate and up are GEMMs of their own", _within(lambda: _unpacked(model), subject.infer)
        )
    return found


class NoHead(XR0Model):
    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        return super().prefill(replace(inputs, preamble_length=0), vision)


class TimePerStep(XR0Model):
    @torch.inference_mode()
    def sample(
        self,
        kv: KVBlock,
        state: Tensor,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """ActionHead.sample, but for the modulations."""
        head, steps = self.head, self.config.head.flow_steps
        prefix_length = prefix_length.to(self.device)
        geometry = dit_geometry(head.config, kv.next_position, kv.mask, prefix_length, noise.shape[1])
        rope, context = head.rope(geometry), head.context(state.to(self.device, self.dtype))
        times = flow_times(steps).to(self.device)

        def velocity(z: Tensor, step: int) -> Tensor:
            now = head.modulations(times[step : step + 1])
            return head(z.to(self.dtype), context, now, rope, geometry.mask, kv.keys, kv.values)

        is_prefix = prefix_positions(prefix_length, noise.shape[1])
        noise, prefix = noise.to(self.device), prefix.to(self.device)
        return euler_sample(velocity, noise, prefix, is_prefix, kv.action_mask, steps, trace)


class JoinedAttention(DiTAttention):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = reference.rotate(self.q_norm(q), cos, sin), reference.rotate(self.k_norm(k), cos, sin)
        groups = self.num_heads // keys.shape[1]
        k = torch.cat((keys.repeat_interleave(groups, dim=1), k), dim=2)
        v = torch.cat((values.repeat_interleave(groups, dim=1), v), dim=2)
        mixed = reference.attention(q, k, v, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FreshTables(VisionTower):
    def _tables(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        return self._make_tables(*grid)


class FreshTokens(PromptTokenizer):
    def encode(self, titles: Any, image_tokens: Any, instruction: str) -> np.ndarray:
        return self._encode(tuple(titles), tuple(image_tokens), normalize_instruction(instruction))


def _sharing(kind: type[SomeModule], original: nn.Module, *arguments: Any) -> SomeModule:
    """A module of that kind that holds the original's own parts and parameters, not copies."""
    with torch.device("meta"):
        twin = kind(*arguments)
    for name, part in original.named_children():
        setattr(twin, name, part)
    for name, parameter in original.named_parameters(recurse=False):
        setattr(twin, name, parameter)
    return twin


def _twin(
    kind: type[XR0Model],
    model: XR0Model,
    visual: VisionTower | None = None,
    language: LanguageModel | None = None,
    head: ActionHead | None = None,
) -> XR0Model:
    """A model of that kind that shares all parts but those given."""
    with torch.device("meta"):
        twin = kind(model.config)
    towers, original = twin.vlm.model, model.vlm.model
    towers.visual, towers.language_model = visual or original.visual, language or original.language_model
    twin.head = head or model.head
    twin.finish_loading()
    return twin


def _with_whole_last_layer(model: XR0Model) -> LanguageModel:
    """Nothing depends on the weights that the engine did not load: they are random."""
    original, config = model.vlm.model.language_model, model.config.text
    with torch.device("meta"):
        last = TextLayer(config, kv_only=False)
    last.to(model.dtype).to_empty(device=model.device)
    pack_linears(last)
    last.requires_grad_(False)
    loaded = dict(original.layers[-1].named_parameters())
    for name, parameter in last.named_parameters():
        if name in loaded:
            parameter.copy_(loaded[name])
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    language = _sharing(LanguageModel, original, config)
    language.layers = nn.ModuleList([*original.layers[:-1], last])
    return language


def _with_joined_attention(model: XR0Model) -> ActionHead:
    config = model.config.head
    layers = []
    for original in model.head.dit.layers:
        assert isinstance(original, DiTLayer)
        layer = _sharing(DiTLayer, original, config)
        layer.attn = _sharing(JoinedAttention, original.attn, config)
        layers.append(layer)
    head = _sharing(ActionHead, model.head, model.config)
    head.dit = _sharing(DiT, model.head.dit, config)
    head.dit.layers = nn.ModuleList(layers)
    return head


def _within(switch: Callable[[], Any], infer: Infer) -> Infer:
    def switched() -> list[ActionChunk]:
        with switch():
            return infer()

    return switched


@contextmanager
def _numpy_patches() -> Iterator[None]:
    patches.native = "switched off to see what it buys"
    try:
        yield
    finally:
        patches.native = None


@contextmanager
def _unpacked(model: XR0Model) -> Iterator[None]:
    packed = {part: part.packed for part in model.modules() if isinstance(part, PackedLinears)}
    for part in packed:
        part.packed = None
    try:
        yield
    finally:
        for part, weight in packed.items():
            part.packed = weight


def check(engine: Infer, found: Mapping[str, Variant], dtype: str) -> dict[str, float]:
    """Optimisation -> relative RMS between the actions with and without. Raises RuntimeError past GATE[dtype]."""
    ours = np.stack([chunk.normalized for chunk in engine()])
    errors = {}
    for name, variant in found.items():
        theirs = np.stack([chunk.normalized for chunk in variant.infer()])
        errors[name] = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
        if not errors[name] < GATE[dtype]:
            raise RuntimeError(
                f"nothing was timed: without {name!r} the actions differ by {errors[name]:.1e}, more than {GATE[dtype]}"
            )
    return errors


def measure(setup: Setup, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did.

    Raises as Subject.load does, and RuntimeError if a variant gives other actions.
    """
    subject = Subject.load(replace(setup, backend="reference"))
    found = variants(subject)
    errors = check(subject.infer, found, setup.dtype)
    calls = {ENGINE: _timed(subject.infer)} | {name: _timed(variant.infer) for name, variant in found.items()}
    series, reason = run(calls, rounds)
    result = Result(
        kind="ablate",
        command=command,
        environment=environment(subject.engine.model.device),
        case=subject.describe(),
        boundary="stage",
        backend=subject.engine.backend,
        series=series,
        facts={
            "stages": {name: variant.stage for name, variant in found.items()},
            "instead": {name: variant.instead for name, variant in found.items()},
            "error_against_engine": errors,
        },
        complete=reason is None,
    )
    return result, reason


def _timed(infer: Infer) -> Callable[[], Mapping[str, float]]:
    return lambda: infer()[0].timing_ms


def show(result: Result) -> None:
    """A table of 80 columns."""
    case = result.case
    table = Table(title=f"{case['name']}, {case['size']}, batch {case['batch']}, {case['dtype']}, ms", box=None)
    for column in ("without", "stage"):
        table.add_column(column)
    for column in ("ms", "with", "bought", "ratio", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in result.facts["stages"].items():
        without, engine = np.array(result.series[name][stage]), np.array(result.series[ENGINE][stage])
        middle, low, high = ratio_with_spread(without, engine)
        bought = f"{np.median(without - engine):+.2f}"
        medians = number(float(np.median(without))), number(float(np.median(engine)))
        table.add_row(name, stage, *medians, bought, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"The whole engine takes {number(float(np.median(result.series[ENGINE]['total'])))} ms. Where the quartiles "
        "enclose 1, the machine's noise hides what is bought."
    )
    console.print(footer(result), markup=False, highlight=False)
