"""What is measured: some cases, with inputs fabricated from the checkpoint's own configuration and pinned seeds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from xr0_engine.backend import resolve_device, resolve_dtype
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.config import HEAD_SIZES, ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.env import cache_dir
from xr0_engine.fused.model import FusedModel
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import RMSNorm, pack_linears
from xr0_engine.model.quantization import Format, find_recipe, quantized_layers, read_quantization
from xr0_engine.model.weights import inference_shapes, layers_in_8bit, resolve_checkpoint
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.robot.decode import encode_prefix
from xr0_engine.robot.embodiment import Embodiment, embodiment_for, load_embodiment
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.sizes import ROBOTS, config_of
from xr0_engine.types import ActionChunk, KVBlock, ModelInputs, Observation

LONG_INSTRUCTION = (
    "Pick up the red cube with the right arm, hand it over to the left arm without letting it touch the table, place "
    "it on the blue plate behind the bowl, then fold the towel in half twice, put it into the drawer below the "
    "counter, close the drawer with the back of the right gripper, and move both arms back to where they started."
)


@dataclass(frozen=True)
class Case:
    """One situation of a robot.

    profile: of embodiment.py, for other views than the robot type's own. image_size: (height, width) of every view as
    the camera gives it. tokens: length of the prompt with Qwen's own tokenizer, for what is measured without a prompt;
    preamble_tokens: of these, before the first picture's, which later calls find kept; by default as before `Ego View`.
    prefix_length: actions already committed. instruction: None is the one of Engine.example. family: of the checkpoint.
    plan: what its random checkpoint has otherwise than its size says (checkpoint.read_plan); for XR-1 an embodiment.
    """

    name: str
    robot_type: str
    image_size: tuple[int, int]
    tokens: int
    preamble_tokens: int = 18
    prefix_length: int = 0
    batch: int = 1
    instruction: str | None = None
    profile: str | None = None
    family: str = "xr0"
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embodiment(self) -> Embodiment:
        return embodiment_for(self.robot_type) if self.profile is None else load_embodiment(self.profile)

    def observations(self, engine: Engine) -> list[Observation]:
        """One per row of the batch, always the same; the first row's images are Engine.example's."""
        example = engine.example(self.robot_type, self.image_size)
        if self.instruction is not None:
            example = replace(example, instruction=self.instruction)
        return [example, *(_other_images(example, row) for row in range(1, self.batch))]

    def prefixes(self, engine: Engine) -> list[np.ndarray | None]:
        """Committed actions in robot units, (prefix_length, A) each, or None."""
        if self.prefix_length == 0:
            return [None] * self.batch
        statistics = engine.statistics[self.robot_type]
        rng = np.random.default_rng(0)
        shape = (self.batch, self.prefix_length, engine.config.head.action_dim)
        return list(statistics.denormalize(rng.standard_normal(shape).astype(np.float32)))

    def noise(self, engine: Engine) -> np.ndarray:
        """(batch, T, A) float32."""
        shape = (self.batch, engine.statistics[self.robot_type].chunk_length, engine.config.head.action_dim)
        return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


CASES = {
    case.name: case
    for case in (
        Case("libero", "libero_all", (256, 256), tokens=194, preamble_tokens=17),
        Case("bimanual", "bimanual", (480, 640), tokens=315),
        # Long chunks from two cameras: the bimanual statistics behind LIBERO's views.
        Case("two_views", "bimanual", (480, 640), tokens=226, preamble_tokens=17, profile="libero"),
        Case("stress", "bimanual", (480, 640), tokens=378, prefix_length=6, batch=8, instruction=LONG_INSTRUCTION),
        # As the base checkpoint's chunks are, from cameras that the profile makes 256x320 of.
        Case("robodojo", "robodojo", (480, 640), tokens=314, family="xr1", plan={"embodiment": "robodojo"}),
        # Three videos of four frames and as many states. 384 tokens are the videos'.
        Case(
            "robocasa365",
            "robocasa365",
            (256, 256),
            tokens=485,
            preamble_tokens=13,
            family="xr1",
            plan={"embodiment": "robocasa365", "state_length": 4, "action_length": 16},
        ),
    )
}


def find_case(name: str) -> Case:
    """Raises ValueError that lists the known ones."""
    if name not in CASES:
        raise ValueError(f"case: expected one of {', '.join(CASES)}; got {name!r}")
    return CASES[name]


@dataclass(frozen=True)
class Setup:
    """What to measure, as it is asked for.

    size: of the case's family, a checkpoint with random weights; checkpoint: the user's own folder or hub id instead.
    threads: of the CPU, None for torch's own choice. backend, quantize: as Engine.from_pretrained takes them.
    """

    case: Case
    size: str = "small"
    checkpoint: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    threads: int | None = None
    backend: str = "auto"
    quantize: str | None = None

    def folder(self) -> Path:
        """The checkpoint's folder. A random one is made on first use and kept in XR0_CACHE.

        Raises ValueError for an unknown size, CheckpointError if there is no such checkpoint.
        """
        if self.checkpoint is not None:
            return resolve_checkpoint(self.checkpoint)
        case = self.case
        config_of(case.family, self.size)
        name = f"{case.family}-{self.size}-{case.name}" if case.plan else self.size
        folder = cache_dir() / name
        if not folder.exists():
            Console(stderr=True).print(f"making a random {name} checkpoint, kept in {folder}")
            with tempfile.TemporaryDirectory() as scratch:
                plan = Path(scratch) / "plan.json"
                plan.write_text(json.dumps(dict(case.plan)), encoding="utf-8")
                init_checkpoint(folder, self.size, config=plan if case.plan else None, family=case.family)
        return folder

    def config(self) -> ModelConfig:
        """Of the random checkpoint, which need not be there. Raises ValueError for an unknown size."""
        base = config_of(self.case.family, self.size)
        lengths = {name: length for name, length in self.case.plan.items() if name in HEAD_SIZES}
        return replace(base, head=replace(base.head, **lengths))

    def chunk(self) -> tuple[int, list[int]]:
        """Length and active columns of the random checkpoint's chunks. Raises ValueError for an unknown size."""
        if not self.case.plan:
            length, columns = ROBOTS[self.case.robot_type]
            return length, list(columns)
        head = self.config().head
        return head.action_length, list(self.case.embodiment.action_layout.active_columns or range(head.action_dim))

    def layers_in_8bit(self, config: ModelConfig) -> tuple[Mapping[str, Format], str | None]:
        """Layer -> format of those that have 8 bits, and by which recipe, without loading anything. Raises ValueError
        for an unknown recipe, or one for a checkpoint that is quantised already."""
        if self.checkpoint is None:
            recipe = self.quantize
            return {} if recipe is None else quantized_layers(recipe, inference_shapes(config)), recipe
        folder = resolve_checkpoint(self.checkpoint)
        stored = read_quantization(folder)
        return layers_in_8bit(folder, config, self.quantize), self.quantize if stored is None else stored.recipe

    def prepare(self) -> torch.device:
        """Set the threads and return the device. Raises ValueError for a device, precision, recipe or number that is
        wrong."""
        resolve_dtype(self.dtype)
        if self.quantize is not None:
            find_recipe(self.quantize)
        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"threads: expected at least 1, got {self.threads}")
            torch.set_num_threads(self.threads)
        return resolve_device(self.device)


@dataclass(frozen=True)
class StepInputs:
    """What a step of the model takes, on the host. noise, prefix: (B, T, A) float32; prefix_length: (B,)."""

    inputs: ModelInputs
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor


@dataclass(frozen=True)
class Subject:
    """An engine and one case's inputs. prefixes: as Engine.infer takes them; noise: (B, T, A) float32."""

    setup: Setup
    folder: Path
    engine: Engine
    observations: list[Observation]
    prefixes: list[np.ndarray | None]
    noise: np.ndarray

    @classmethod
    def load(cls, setup: Setup) -> Subject:
        """Raises ValueError for what is wrong in setup, CheckpointError for a checkpoint that cannot be used."""
        device, case = setup.prepare(), setup.case
        folder = setup.folder()
        engine = Engine.from_pretrained(
            folder, str(device), setup.dtype, setup.backend, case.profile, quantize=setup.quantize
        )
        return cls(setup, folder, engine, case.observations(engine), case.prefixes(engine), case.noise(engine))

    def with_case(self, case: Case) -> Subject:
        """The same model in another case."""
        profile = None if case.profile is None else load_embodiment(case.profile)
        engine = Engine(self.engine.model, Preprocessor.load(self.folder, profile), self.engine.backend)
        inputs = case.observations(engine), case.prefixes(engine), case.noise(engine)
        return Subject(replace(self.setup, case=case), self.folder, engine, *inputs)

    @property
    def recipe(self) -> str | None:
        """By which the engine's weights have 8 bits: what was asked for, or what the folder tells."""
        stored = read_quantization(self.folder)
        return self.setup.quantize if stored is None else stored.recipe

    def plain_model(self) -> XR0Model:
        """The network whose weights the engine runs with, as PyTorch's operators compute it."""
        model = self.engine.model
        plain = model.reference if isinstance(model, FusedModel) else model
        assert isinstance(plain, XR0Model), "an export has no weights of its own to share"
        return plain

    def fused_model(self) -> FusedModel:
        """Raises NotImplementedError for a backend without fused ops."""
        if not isinstance(self.engine.model, FusedModel):
            raise NotImplementedError(f"backend {self.engine.backend!r} has no fused ops; take --backend triton")
        return self.engine.model

    def infer(self) -> list[ActionChunk]:
        return self.engine.infer(self.observations, self.prefixes, self.noise)

    def inputs(self) -> ModelInputs:
        """On the host, patches as suits the engine's network."""
        preprocess = Preprocessor.load(self.folder, self.setup.case.embodiment)
        inputs = preprocess(self.observations, self.engine.model.patch_buffer)
        if (patches := inputs.pixel_values).device.type == "cpu":
            return inputs
        pinned = torch.empty_like(patches, device="cpu", pin_memory=True)
        return replace(inputs, pixel_values=pinned.copy_(patches))

    def step_inputs(self) -> StepInputs:
        prefix = np.zeros_like(self.noise)
        for row, given in enumerate(self.prefixes):
            if given is not None:
                prefix[row, : len(given)] = encode_prefix(given, self.engine.statistics[self.setup.case.robot_type])
        lengths = torch.tensor([0 if given is None else len(given) for given in self.prefixes])
        return StepInputs(self.inputs(), torch.from_numpy(self.noise), torch.from_numpy(prefix), lengths)

    def describe(self) -> dict[str, Any]:
        """The case, as Result holds it."""
        return describe(self.setup, self.inputs().input_ids.shape[1], self.noise.shape[1], self.recipe)


@dataclass(frozen=True)
class HeadSubject:
    """The action head alone, with random weights, and what it reads: KV block, state, noise, prefix.

    kv: as types.py has it; state: (B, state_length, S); noise, prefix: (B, T, A) float32; prefix_length: (B,);
    table: ActionHead.modulation_table.
    """

    setup: Setup
    config: ModelConfig
    head: ActionHead
    kv: KVBlock
    state: Tensor
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor
    table: Tensor

    @classmethod
    @torch.inference_mode()
    def make(cls, setup: Setup) -> HeadSubject:
        """Needs no checkpoint and writes none. Raises ValueError for what is wrong in setup, NotImplementedError for
        another backend than the reference."""
        if setup.backend not in ("auto", "reference"):
            raise NotImplementedError(
                f"backend {setup.backend!r}: the action head alone runs on 'reference'; boundary replay has its own"
            )
        if setup.checkpoint is not None:
            raise ValueError("checkpoint: expected none, since the action head alone is measured with random weights")
        config = setup.config()
        length, columns = setup.chunk()
        device, dtype, case = setup.prepare(), resolve_dtype(setup.dtype), setup.case
        sizes, batch = config.head, case.batch
        random = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            head = ActionHead(config)
        head.to(dtype).to_empty(device=device)
        pack_linears(head)
        _randomise(head.eval().requires_grad_(False), random)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device)

        kv_shape = (sizes.num_layers, batch, sizes.num_kv_heads, case.tokens, sizes.head_dim)
        action_mask = torch.zeros(batch, length, sizes.action_dim, device=device)
        action_mask[..., columns] = 1
        kv = KVBlock(
            keys=normal(*kv_shape).to(dtype),
            values=normal(*kv_shape).to(dtype),
            mask=torch.ones(batch, case.tokens, dtype=torch.bool, device=device),
            next_position=torch.full((3, batch), case.tokens, device=device),
            action_mask=action_mask,
        )
        return cls(
            setup=setup,
            config=config,
            head=head,
            kv=kv,
            state=normal(batch, sizes.state_length, sizes.state_dim),
            noise=normal(batch, length, sizes.action_dim),
            prefix=normal(batch, length, sizes.action_dim),
            prefix_length=torch.full((batch,), case.prefix_length, device=device),
            table=head.modulation_table(),
        )

    @torch.inference_mode()
    def sample(self) -> Tensor:
        """(B, T, A) float32, on the device."""
        return self.head.sample(self.kv, self.state, self.noise, self.prefix, self.prefix_length, self.table)

    def describe(self) -> dict[str, Any]:
        return describe(self.setup, self.kv.mask.shape[1], self.noise.shape[1])


def describe(setup: Setup, tokens: int, chunk_length: int, recipe: str | None = None) -> dict[str, Any]:
    """recipe: by which the engine's weights have 8 bits; only then a field of its own."""
    case = setup.case
    return {
        "name": case.name,
        "size": setup.size if setup.checkpoint is None else Path(setup.checkpoint).name,
        "robot_type": case.robot_type,
        "views": [list(case.image_size) for _ in case.embodiment.views],
        "tokens": tokens,
        "chunk_length": chunk_length,
        "prefix_length": case.prefix_length,
        "batch": case.batch,
        "dtype": setup.dtype,
        **({} if recipe is None else {"recipe": recipe}),
    }


def _other_images(example: Observation, row: int) -> Observation:
    rng = np.random.default_rng(row)
    images = {key: rng.integers(0, 256, image.shape, dtype=np.uint8) for key, image in example.images.items()}
    return replace(example, images=images)


def _randomise(module: nn.Module, random: torch.Generator) -> None:
    """Weights that keep activations in range: norms near 1, biases near 0, matrices by their width."""
    norms = {id(part.weight) for part in module.modules() if isinstance(part, RMSNorm)}
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=random)
        if id(parameter) in norms:
            value = 1 + 0.1 * value
        elif name.endswith("bias"):
            value *= 0.02
        else:
            value /= parameter.shape[-1] ** 0.5
        parameter.copy_(value)
