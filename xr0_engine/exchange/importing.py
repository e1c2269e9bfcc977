"""A released training run, or a file of its weights -> a checkpoint folder that the engine loads.

Such a file holds tensors alone. They tell the family and the sizes of the action head; other sizes, the tokenizer and
the image settings come from a checkpoint of the same model, or from the VLM that it was made of; mask mode, statistics
and robot type from the run's own configuration, or they are asked for (spec sections 2.4, 3.3 and 4.1).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xr0_engine.checkpoint import write_weights
from xr0_engine.config import TRAINED_PREFIX, ModelConfig
from xr0_engine.exchange.foundation import base_config, other_sizes, weights_family
from xr0_engine.exchange.modes import MODES, Mode, described
from xr0_engine.exchange.pickled import Weights, read_weights
from xr0_engine.exchange.recipe import QUANTILES, Recipe, find_recipe, read_action_config
from xr0_engine.family import FAMILIES
from xr0_engine.files import find_settings
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.weights import TIED_LM_HEAD, StoredTensor, check_tensors, checkpoint_shapes, resolve_checkpoint
from xr0_engine.robot.limits import ImageLimits, load_limits
from xr0_engine.robot.normalize import STATISTICS_FILE, load_statistics
from xr0_engine.types import CheckpointError
from xr0_engine.whole import whole_folder

EMBEDDINGS = "vlm.model.language_model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
"""How the names begin of what belongs to the tokenizer."""
IMPORT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ImportOptions:
    """step: of a run's steps. mode: a key of the family's MODES; None: post-training for a run, else refused.

    local_window, position_offset, max_prefix: instead of the mode's and the run's. statistics: a file of them; None:
    the run's own. robot_type: the name for statistics without one, or the one that is wanted. dtype: of IMPORT_DTYPES.
    """

    step: str | None = None
    mode: str | None = None
    local_window: int | None = None
    position_offset: int | None = None
    max_prefix: int | None = None
    statistics: Path | None = None
    robot_type: str | None = None
    dtype: str = "bfloat16"


def import_released(source: Path, out: Path, like: str | Path, options: ImportOptions | None = None) -> list[str]:
    """Write a folder that the engine loads; it appears whole or not at all. Returns what was taken from where.

    source: as in pickled.read_weights. like: folder or hub id of a checkpoint of the same model, or of its VLM alone.
    Raises CheckpointError or ValueError that names file, field and remedy, and OSError.
    """
    options = options or ImportOptions()
    if options.dtype not in IMPORT_DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(IMPORT_DTYPES)}, got {options.dtype!r}")
    refuse_occupied(out)
    weights = read_weights(source, options.step)
    recipe = find_recipe(weights.files[0]) if weights.is_run else None
    family = weights_family(weights)
    mode = _mode(weights, family, recipe, options)
    folder = resolve_checkpoint(like)
    base = base_config(folder, weights)
    config = _configured(base, mode, recipe, options)
    shapes = _check(weights, config, folder)
    action_config, told_by = _action_config(weights, mode, recipe, options)
    settings = read_settings(folder)
    limits = mode.limits or load_limits(folder, config.vision)
    # Whether images are resized at all is the limits' too.
    others = {name: value for name, value in settings.items() if name != "do_resize"}
    preprocessor = {**others, **limits.to_hf(), "action_config": action_config}
    dtype = IMPORT_DTYPES[options.dtype]
    num_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    with whole_folder(out, num_bytes) as target:
        (target / "config.json").write_text(json.dumps(config.to_hf(), indent=2), encoding="utf-8")
        (target / STATISTICS_FILE).write_text(json.dumps(preprocessor), encoding="utf-8")
        _check_statistics(target, config, told_by)
        copy_tokenizer(folder, target)
        write_weights(target, shapes, dtype, lambda names: _converted(names, weights, dtype))
    told = [*_told(weights, config, mode, limits, options), f"statistics: {', '.join(action_config)}, from {told_by}"]
    return told + list(other_sizes(folder, config))


def read_settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint's preprocessor_config.json, or what stands in its place, says.

    Raises CheckpointError if it is missing or no JSON object.
    """
    for path, settings in find_settings(folder).items():
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(settings).__name__}")
        return dict(settings)
    raise CheckpointError(f"{folder} holds no {STATISTICS_FILE}: the image settings are missing")


def refuse_occupied(out: Path) -> None:
    """Raises ValueError for a folder that holds something, and for a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or choose another folder")


def copy_tokenizer(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, target / file.name)


def _mode(weights: Weights, family: str, recipe: Recipe | None, options: ImportOptions) -> Mode:
    modes = MODES[family]
    name = options.mode or ("post-training" if weights.is_run else None)
    if name is None:
        choices = " or ".join(f"--mode {key} ({described(mode)})" for key, mode in modes.items())
        raise ValueError(
            f"mode: {weights.files[0]} is no state of a training run, so nothing says how its weights are to be run: "
            f"{choices}. The first is that of {FAMILIES[family].title}'s post-training code, the other that of the "
            "released benchmark checkpoints"
        )
    if name not in modes:
        raise ValueError(f"mode: expected {' or '.join(modes)}, got {name!r}")
    mode = modes[name]
    trained = recipe.model.get("local_window") if recipe and mode.local_window is not None else None
    if isinstance(trained, int):
        mode = replace(mode, local_window=trained)
    given = {key: getattr(options, key) for key in ("local_window", "position_offset")}
    return replace(mode, **{key: value for key, value in given.items() if value is not None})


def _configured(config: ModelConfig, mode: Mode, recipe: Recipe | None, options: ImportOptions) -> ModelConfig:
    """The checkpoint's configuration in the mode."""
    max_prefix = options.max_prefix
    if max_prefix is None and mode.local_window is not None:
        is_async = bool(recipe and recipe.model.get("async_train") is True)
        max_prefix = TRAINED_PREFIX if is_async else 0
    head = replace(
        config.head,
        local_window=mode.local_window,
        position_offset=mode.position_offset,
        max_prefix=config.head.max_prefix if max_prefix is None else max_prefix,
    )
    return replace(config, head=head, std_epsilon=mode.std_epsilon, normalize_instruction=mode.normalize_instruction)


def _check(weights: Weights, config: ModelConfig, like: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is written: all that the model has, and what only training has where it is there."""
    file, shapes, optional = weights.files[0], checkpoint_shapes(config), choice_shapes(config)
    if not shapes.keys() & weights.tensors.keys():
        names = ", ".join(list(weights.tensors)[:3])
        raise CheckpointError(f"{file} holds another model: {names}, ... instead of {', '.join(list(shapes)[:3])}, ...")
    places = {name: StoredTensor(file, name, tuple(it.shape), it.dtype) for name, it in weights.tensors.items()}
    try:
        check_tensors(places, shapes, optional)
    except CheckpointError as error:
        raise CheckpointError(f"{file}, by the config.json of {like}: {error}") from None
    head = weights.tensors.get(TIED_LM_HEAD)
    if head is not None and not torch.equal(head, weights.tensors[EMBEDDINGS]):
        raise CheckpointError(f"{file}: {TIED_LM_HEAD} differs from the text embeddings; the model ties them")
    return {**shapes, **{name: shape for name, shape in optional.items() if name in places}}


def _action_config(
    weights: Weights, mode: Mode, recipe: Recipe | None, options: ImportOptions
) -> tuple[dict[str, Any], Path]:
    """Robot type -> statistics, and the file that they are from."""
    file = options.statistics
    if file is not None:
        action_config = read_action_config(file, options.robot_type)
    elif recipe is not None:
        file = recipe.file
        action_config = read_action_config(file, options.robot_type)
    else:
        raise ValueError(
            f"statistics: {weights.files[0]} comes without mean and std of actions, as a run's config.py would give "
            "them: --statistics FILE, as `xr0 data stats` writes it, or a checkpoint's preprocessor_config.json"
        )
    if mode.columns:
        if len(action_config) > 1:
            raise ValueError(
                f"robot_type: a released run trains one robot, {file} holds {', '.join(action_config)}: "
                "choose by --robot-type"
            )
        # The post-training code always uses these, whatever the statistics (spec section 3.3).
        action_config = {
            name: {"active_columns": list(mode.columns), **entry} if isinstance(entry, dict) else entry
            for name, entry in action_config.items()
        }
    if mode.has_quantiles:
        action_config = {name: _with_quantiles(file, name, entry) for name, entry in action_config.items()}
    return action_config, file


def _with_quantiles(file: Path, name: str, entry: Any) -> Any:
    """An entry that says how states are normalised: as it stands, or by the q01 and q99 of released statistics."""
    if not isinstance(entry, Mapping) or entry.get("state") is not None:
        return entry
    missing = [key for key in QUANTILES if entry.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{file}: robot type {name!r} lacks {' and '.join(missing)} of its states, by which this code normalises "
            "them: give --statistics FILE with `state`, or with `q01` and `q99` as released data configurations have"
        )
    others = {key: value for key, value in entry.items() if key not in QUANTILES}
    return {**others, "state": {"rule": "post_training", **{key: _row(entry[key]) for key in QUANTILES}}}


def _row(table: Any) -> Any:
    """Released statistics have a row in a list."""
    return table[0] if isinstance(table, list) and len(table) == 1 and isinstance(table[0], list) else table


def _check_statistics(target: Path, config: ModelConfig, told_by: Path) -> None:
    try:
        load_statistics(target, config.head.action_dim, config.std_epsilon, config.double_statistics)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(target / STATISTICS_FILE), str(told_by))) from None


def _converted(names: list[str], weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    values = {name: weights.tensors[name].to(dtype).contiguous() for name in names}
    broken = [name for name, value in values.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{weights.files[0]}: {broken[0]} holds NaN or infinity, as after a run that diverged: choose an earlier "
            "step"
        )
    return values


def _told(
    weights: Weights, config: ModelConfig, mode: Mode, limits: ImageLimits, options: ImportOptions
) -> Iterator[str]:
    head = config.head
    stored = sorted({str(it.dtype).removeprefix("torch.") for it in weights.tensors.values()})
    yield f"weights: {', '.join(str(file) for file in weights.files)}, {' and '.join(stored)} -> {options.dtype}"
    yield f"family: {FAMILIES[config.family].title}, by the names of its tensors"
    if weights.is_run and stored == ["bfloat16"]:
        yield (
            "these are the bfloat16 weights that the released server loads; a run's float32 masters are not read "
            "(merge them by the run's zero_to_fp32.py and convert its output, if you need them)"
        )
    mask = "full causal" if head.local_window is None else f"{head.local_window} actions back"
    yield f"mask: {mask}; position offset {head.position_offset}; std_epsilon {config.std_epsilon:g}"
    text = "with a capital and a full stop" if config.normalize_instruction else "as it is given"
    yield f"task text: {text}; prefixes of up to {head.max_prefix} actions"
    if mode.limits is not None:
        yield f"images: {limits.min_pixels:,} to {limits.max_pixels:,} pixels, as that code has them"
    if head.max_prefix == 0 and options.max_prefix is None:
        yield "no prefixes: nothing says that the run trained with them (async_train: true); --max-prefix 6 if it did"
