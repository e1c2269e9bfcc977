"""What a training run is: frozen dataclasses, overrides from the command line, and their JSON. No torch here.

A run is a recipe's config (recipes.py) with overrides; the resolved config is saved with the run and read on resume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from xr0_engine.files import parse_json
from xr0_engine.part_configs import POSITIONS, STEPS
from xr0_engine.training.values import build, parse, unknown

MOST_PROCESSES = 1 << 10
MOST_SAMPLES = 1 << 16
MOST_STEPS = 1 << 40
LARGEST_SEED = 2**63 - 1
"""Beyond these, a number in a file is a slip, and what is reserved for it is more than there is."""

MOST_CHOICE_STEPS = 60
"""Steps of a chunk that XR-1's language model has tokens for (family.ACTION_TOKENS)."""

Target: TypeAlias = Literal["vlm_attention", "vlm_mlp", "vision", "projector", "dit"]
MOST_RANK = 1 << 12

_WANDB = re.compile(r"[^/\\#?%:]+(/[^/\\#?%:]+)?")

UNSET = ""
"""A path that a recipe leaves to the user."""


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from and which of them learn.

    checkpoint: folder or hub id that gives sizes, tokenizer and starting weights, of XR-0 or its VLM alone (base.py).
    train: `head` (VLM frozen, kept in the compute dtype), `vlm` (head frozen) or `all`.
    fresh_head: start the DiT from new random weights instead of the checkpoint's.
    train_text_embeddings: they stay frozen unless this is set (so does the LM head, which is tied to them).
    standardize_vision: shift and scale the vision tower to the training images before the first step (standardize.py),
    for towers with random weights.
    local_window, position_offset: the DiT's attention and positions (spec section 2.4); saved with the checkpoint.
    checkpoint_activations: recompute the vision tower's activations in the backward pass.
    checkpoint_language: the same of the language layers; the keys and values that the DiT reads are kept.
    offload_frozen: frozen weights of the VLM's layers stay in the machine's memory, each is on the device as it runs.
    dtype: bfloat16 or float32, of the computation; trained weights and their gradients are float32 all the same.
    """

    checkpoint: str = UNSET
    train: Literal["all", "vlm", "head"] = "all"
    fresh_head: bool = False
    train_text_embeddings: bool = False
    standardize_vision: bool = False
    local_window: int | None = None
    position_offset: int = 0
    checkpoint_activations: bool = True
    checkpoint_language: bool = False
    offload_frozen: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class DataConfig:
    """robot, language, validation: datasets, each `path` or `path=weight` (weights are relative, 1 if not given); for a
    path also `organisation/name` or `organisation/name@revision`, of the Hugging Face hub.

    robot and validation also take `package.module:function` for a path, a dataset that a function opens (docs/data.md).
    language_every: every n-th micro-batch is vision-language data (7 = the paper's 1 : 6), 0 = none.
    validation_fraction: of the robot data's episodes, held out if no validation data are given; 0 = no validation.
    validation_samples: about how many. validation_draws: chunks drawn for each, of whose mean l1_mean is. statistics:
    JSON of `xr0 data stats`. embodiment: profile name or YAML file, for all data; if not set, the built-in profile of
    each robot type, or the one that all datasets by function have. chunk_length: T. batch_size: samples per process and
    micro-batch. workers: processes that read, per process that trains. augment: colour and crop of training images.
    random_crop: False leaves the profile's own crop in that one's place, or none.
    state_quantiles: states are normalised by the statistics' quantiles (`xr0 data stats --quantiles`), as XR-1's are.
    normalize_instruction: the task text gets a capital and a full stop in the prompt, or stays as recorded; saved with
    the checkpoint. skip_broken: replace samples that cannot be read, and count them, instead of stopping.
    """

    robot: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    language_every: int = 0
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.1
    validation_samples: int = 256
    validation_draws: int = 8
    statistics: str = UNSET
    embodiment: str = UNSET
    chunk_length: int = 30
    batch_size: int = 16
    workers: int = 4
    augment: bool = True
    random_crop: bool = True
    state_quantiles: bool = False
    normalize_instruction: bool = True
    skip_broken: bool = False


@dataclass(frozen=True)
class FlowConfig:
    """Flow matching (spec section 4.1).

    time: beta = 0.999 (1 - Beta(1.5, 1)), more weight near noise; logistic_normal; uniform.
    repeat: draws of noise and time per VLM pass. prefix: how its length is drawn: none; code = with probability 0.5
    uniform in 1..min(max_prefix, T), else 0; paper = uniform in 0..max_prefix; one length per micro-batch.
    column_dropout: probability that a prefix action before the last two is hidden from the noisy ones.
    reweight_errors: weigh by the model's own error where there is a prefix. frequency_weight: c, 0 = off.
    frequency: which of the spectrum it is: of all columns together, each sample alike; selected: XR-1's, by the mask's
    first rows (losses.py: spectrum_selection). frequency_masked: leave unsupervised columns out of the former (the
    released code does not). frequency_excluded: columns that never count in the latter.
    """

    time: Literal["beta", "logistic_normal", "uniform"] = "beta"
    repeat: int = 4
    prefix: Literal["none", "code", "paper"] = "none"
    max_prefix: int = 6
    column_dropout: float = 0.0
    reweight_errors: bool = False
    mse_weight: float = 0.5
    frequency_weight: float = 0.0
    frequency: Literal["columns", "selected"] = "columns"
    frequency_masked: bool = True
    frequency_excluded: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChoiceConfig:
    """Choice Policies (spec section 4.2): candidates chunks and scores in one pass of the VLM.

    candidates: as many as the family has, with objective joint. state_tokens: of a model of several states, which stand
    in the turn of objective joint: `last`, the newest alone, or `each` (spec section 8). action_weight, score_weight,
    language_weight: of the closest candidate's distance, of the score regression and of next-token prediction.
    """

    candidates: int = 5
    state_tokens: Literal["last", "each"] = "last"
    action_weight: float = 1.0
    score_weight: float = 0.1
    language_weight: float = 1.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (lora.py): layers of the targets keep their weights and learn a product of two thin matrices.

    The rest of the VLM is frozen, in the compute dtype; the rest of the action head learns whole, float32.
    rank: of the product; 0 = no adapters. alpha: the product counts alpha / rank times. targets: vlm_attention and
    vlm_mlp, of the language layers; vision, the vision tower's blocks; projector, between tower and language model;
    dit, the DiT's layers, which otherwise learn whole.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[Target, ...] = ("vlm_attention", "vlm_mlp")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, all in optimiser steps; accumulate: micro-batches per step.

    start_lr: where the warm-up begins; none: at min_lr. average: decay of the moving average of the weights that learn,
    which `xr0 train export --average` writes; 0 = none is kept. moments: of AdamW between steps; 8bit takes a byte for
    each where float32 takes four (moments.py).
    """

    steps: int = 30_000
    warmup_steps: int = 2_000
    peak_lr: float = 1e-4
    min_lr: float = 5e-7
    start_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    average: float = 0.0
    moments: Literal["float32", "8bit"] = "float32"


@dataclass(frozen=True)
class RunConfig:
    """Everything in steps. keep_last: checkpoints kept. threads: torch's on a CPU, 0 = its own choice.

    peak_tflops: of the device, for the utilisation; 0 = from the device's name, unknown ones report none.
    closed_loop: `package.module:function` that drives a robot with the policy every closed_loop_every steps, before the
    first and after the last (closed_loop.py); none if not set. wandb: a project of Weights & Biases, `project` or
    `entity/project`, that the metrics go to beside TensorBoard (tracking.py).
    """

    seed: int = 0
    log_every: int = 10
    validate_every: int = 1_000
    checkpoint_every: int = 1_000
    keep_last: int = 3
    threads: int = 0
    peak_tflops: float = 0.0
    closed_loop: str = UNSET
    closed_loop_every: int = 1_000
    wandb: str = UNSET


@dataclass(frozen=True)
class TrainConfig:
    """objective: `flow` trains an action head on the VLM's KV cache, `choice` the VLM with Choice Policies, `joint`
    both on one pass of the VLM, as XR-1's. family: of the checkpoints that the recipe is for (family.py)."""

    recipe: str
    objective: Literal["flow", "choice", "joint"] = "flow"
    family: Literal["xr0", "xr1"] = "xr0"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        problems = [f"{name}: expected {expected}" for holds, name, expected in _rules(self) if not holds]
        if problems:
            raise ValueError("config: " + "; ".join(problems))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """The inverse of to_json. Raises ValueError for unknown keys, with the nearest known one, and wrong values."""
        return build(TrainConfig, parse_json(text.encode()))


def override(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The config with `key=value` assignments applied, such as `optim.peak_lr=1e-4` or `data.robot=a,b=2`.

    Tuples are comma-separated, None is `none`. Raises ValueError for a key that does not exist, with the nearest one
    that does, and for a value of the wrong kind.
    """
    changes: dict[str, dict[str, Any]] = {}
    kinds = dict(keys(config))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"config: expected key=value, got {assignment!r}")
        if key not in kinds:
            raise ValueError(f"config: {unknown(key, list(kinds))}")
        part, name = key.split(".")
        changes.setdefault(part, {})[name] = parse(kinds[key], text, key)
    parts = {part: replace(getattr(config, part), **values) for part, values in changes.items()}
    return replace(config, **parts)


def keys(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of everything that can be overridden."""
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            hints = get_type_hints(type(value))
            yield from ((f"{part.name}.{item.name}", hints[item.name]) for item in fields(value))


def _rules(config: TrainConfig) -> Iterator[tuple[bool, str, str]]:
    """(holds, key, expectation) of every constraint between values of the right type."""
    data, flow, choice, optim, run = config.data, config.flow, config.choice, config.optim, config.run
    at_least_one = {
        "data.chunk_length": data.chunk_length,
        "data.batch_size": data.batch_size,
        "data.validation_samples": data.validation_samples,
        "flow.repeat": flow.repeat,
        "choice.candidates": choice.candidates,
        "optim.steps": optim.steps,
        "optim.accumulate": optim.accumulate,
        "run.log_every": run.log_every,
        "run.validate_every": run.validate_every,
        "run.checkpoint_every": run.checkpoint_every,
        "run.keep_last": run.keep_last,
        "run.closed_loop_every": run.closed_loop_every,
        "data.validation_draws": data.validation_draws,
    }
    yield from ((value >= 1, name, f"at least 1, got {value}") for name, value in at_least_one.items())
    not_negative = {
        "data.language_every": data.language_every,
        "data.workers": data.workers,
        "flow.max_prefix": flow.max_prefix,
        "flow.mse_weight": flow.mse_weight,
        "flow.frequency_weight": flow.frequency_weight,
        "model.position_offset": config.model.position_offset,
        "lora.rank": config.lora.rank,
        "choice.action_weight": choice.action_weight,
        "choice.score_weight": choice.score_weight,
        "choice.language_weight": choice.language_weight,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.weight_decay": optim.weight_decay,
        "optim.min_lr": optim.min_lr,
        "run.seed": run.seed,
        "run.threads": run.threads,
        "run.peak_tflops": run.peak_tflops,
    }
    yield from ((value >= 0, name, f"0 or more, got {value}") for name, value in not_negative.items())
    at_most = {
        "data.chunk_length": (data.chunk_length, STEPS[1]),
        "flow.max_prefix": (flow.max_prefix, STEPS[1]),
        "model.position_offset": (config.model.position_offset, POSITIONS[1]),
        "data.workers": (data.workers, MOST_PROCESSES),
        "run.threads": (run.threads, MOST_PROCESSES),
        "data.batch_size": (data.batch_size, MOST_SAMPLES),
        "data.validation_samples": (data.validation_samples, MOST_SAMPLES),
        "data.validation_draws": (data.validation_draws, MOST_SAMPLES),
        "flow.repeat": (flow.repeat, MOST_SAMPLES),
        "choice.candidates": (choice.candidates, MOST_SAMPLES),
        "lora.rank": (config.lora.rank, MOST_RANK),
        "run.seed": (run.seed, LARGEST_SEED),
        "optim.steps": (optim.steps, MOST_STEPS),
        "optim.warmup_steps": (optim.warmup_steps, MOST_STEPS),
        "optim.accumulate": (optim.accumulate, MOST_STEPS),
    }
    yield from ((value <= most, name, f"at most {most}, got {value}") for name, (value, most) in at_most.items())
    yield 0 <= data.validation_fraction < 1, "data.validation_fraction", f"0 to below 1, got {data.validation_fraction}"
    yield 0 <= flow.column_dropout <= 1, "flow.column_dropout", f"0 to 1, got {flow.column_dropout}"
    yield all(0 <= beta < 1 for beta in optim.betas), "optim.betas", f"each from 0 below 1, got {optim.betas}"
    yield 0 <= optim.average < 1, "optim.average", f"0 to below 1, got {optim.average}"
    yield optim.clip_norm > 0, "optim.clip_norm", f"more than 0, got {optim.clip_norm}"
    start = optim.start_lr
    yield start is None or 0 <= start <= optim.peak_lr, "optim.start_lr", f"0 to peak_lr {optim.peak_lr}, got {start}"
    yield optim.min_lr <= optim.peak_lr, "optim.min_lr", f"at most peak_lr {optim.peak_lr}, got {optim.min_lr}"
    window = config.model.local_window
    yield window is None or window >= 0, "model.local_window", f"0 or more, or none, got {window}"
    is_choice = config.objective == "choice"
    yield not is_choice or config.model.train == "vlm", "model.train", "`vlm` with objective choice"
    yield is_choice or config.model.train != "vlm", "model.train", "`all` or `head` with objective flow"
    is_joint = config.objective == "joint"
    yield not is_joint or config.model.train == "all", "model.train", "`all` with objective joint, whose losses need it"
    yield (
        is_joint or choice.state_tokens == "last",
        "choice.state_tokens",
        f"`last` with objective {config.objective}, which has no turn for others",
    )
    yield (
        not is_joint or data.chunk_length <= MOST_CHOICE_STEPS,
        "data.chunk_length",
        f"at most {MOST_CHOICE_STEPS} with objective joint, a token of the VLM each; got {data.chunk_length}",
    )
    yield all(column >= 0 for column in flow.frequency_excluded), "flow.frequency_excluded", "columns from 0"
    yield (
        not (is_choice and run.closed_loop),
        "run.closed_loop",
        "none with objective choice: it trains no DiT",
    )
    yield is_choice or data.language_every == 0, "data.language_every", f"0 with objective {config.objective}"
    yield (
        not (config.model.standardize_vision and config.model.train == "head"),
        "model.standardize_vision",
        "false with model.train=head, which leaves the VLM as it is",
    )
    offloads, lora = config.model.offload_frozen, config.lora
    yield (
        not offloads or config.model.train == "head" or lora.rank > 0,
        "model.offload_frozen",
        "false where the VLM's layers learn: it is for lora.rank and model.train=head",
    )
    yield (
        not (offloads and lora.rank) or config.model.checkpoint_language,
        "model.checkpoint_language",
        "true with model.offload_frozen and adapters: the backward pass would keep every layer's weights",
    )
    yield (
        not (offloads and lora.rank and "vision" in lora.targets) or config.model.checkpoint_activations,
        "model.checkpoint_activations",
        "true with model.offload_frozen and lora.targets=vision",
    )
    yield (
        not run.wandb or _WANDB.fullmatch(run.wandb) is not None,
        "run.wandb",
        f"a project or entity/project, without any of \\ # ? % :, got {run.wandb!r}",
    )
    yield data.language_every != 1, "data.language_every", "0, or at least 2: the rest is robot data"
    adapts = lora.rank > 0
    yield (
        not (adapts and "dit" in lora.targets and config.model.fresh_head),
        "lora.targets",
        "none of dit with model.fresh_head: new layers must learn whole",
    )
    yield lora.alpha > 0, "lora.alpha", f"more than 0, got {lora.alpha}"
    yield bool(lora.targets), "lora.targets", f"at least one of {', '.join(get_args(Target))}"
    yield len({*lora.targets}) == len(lora.targets), "lora.targets", f"each once, got {', '.join(lora.targets)}"
    yield (
        not adapts or config.model.train == "all",
        "lora.rank",
        f"0 with model.train={config.model.train}: adapters are for recipes that train the whole model",
    )
    yield (
        not (adapts and (config.model.train_text_embeddings or config.model.standardize_vision)),
        "lora.rank",
        "0 with model.train_text_embeddings or model.standardize_vision: adapters leave the rest of the VLM as it is",
    )
