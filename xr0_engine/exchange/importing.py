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

from xr0_engine.config import TRAINED_PREFIX, ModelConfig, describes_vlm, read_hf_config
from xr0_engine.exchange.entries import entry_in, state_length
from xr0_engine.exchange.foundation import base_config, other_sizes, weights_family
from xr0_engine.exchange.modes import MODES, Mode, described
from xr0_engine.exchange.pickled import Weights, read_weights
from xr0_engine.exchange.recipe import Recipe, find_recipe, read_action_config
from xr0_engine.family import FAMILIES
from xr0_engine.files import find_settings
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.weights import TIED_LM_HEAD, StoredTensor, check_tensors, checkpoint_shapes, resolve_checkpoint
from xr0_engine.model.writing import stored_sizes, write_weights
from xr0_engine.robot.limits import RELEASED_LIMITS, VIDEO_FILE, ImageLimits, find_video_settings, load_limits
from xr0_engine.robot.normalize import STATISTICS_FILE, check_states, load_statistics
from xr0_engine.types import CheckpointError
from xr0_engine.whole import refuse_used, whole_folder

EMBEDDINGS = "vlm.model.language_model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
"""How the names begin of what belongs to the tokenizer."""
IMPORT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ImportOptions:
    """step: of a run's steps. mode: a key of the family's MODES; None: what a run's configuration shows, else refused.

    local_window, position_offset, max_prefix, state_length: instead of the mode's, the run's and like's. statistics: a
    file of them; None: the run's own. robot_type: the name for statistics without one, or the one that is wanted.
    dtype: of IMPORT_DTYPES.
    """

    step: str | None = None
    mode: str | None = None
    local_window: int | None = None
    position_offset: int | None = None
    max_prefix: int | None = None
    state_length: int | None = None
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
    refuse_used(out)
    weights = read_weights(source, options.step)
    recipe = find_recipe(weights.files[0]) if weights.is_run else None
    family = weights_family(weights)
    mode = _mode(weights, family, recipe, options)
    folder = resolve_checkpoint(like)
    base, is_vlm = base_config(folder, weights), describes_vlm(read_hf_config(folder))
    shapes = _check(weights, base, folder)
    action_config, told_by = _action_config(weights, mode, recipe, options)
    states, states_by = state_length(
        base, None if is_vlm else folder, mode, recipe, action_config, options.state_length
    )
    config = _configured(base, mode, recipe, options, states)
    settings = read_settings(folder)
    # A VLM's own are not the model's.
    limits = mode.limits or (RELEASED_LIMITS if is_vlm else load_limits(folder, config.vision))
    # Whether images are resized at all is the limits' too.
    others = {name: value for name, value in settings.items() if name != "do_resize"}
    preprocessor = {**others, **limits.to_hf(), "action_config": action_config}
    dtype = IMPORT_DTYPES[options.dtype]
    sizes = stored_sizes(shapes, dtype)
    with whole_folder(out, sum(sizes.values())) as target:
        (target / "config.json").write_text(json.dumps(config.to_hf(), indent=2), encoding="utf-8")
        (target / STATISTICS_FILE).write_text(json.dumps(preprocessor), encoding="utf-8")
        _check_statistics(target, config, told_by)
        copy_tokenizer(folder, target)
        if mode.videos:
            _write_video_settings(folder, target, config, is_vlm)
        write_weights(target, sizes, lambda names: _converted(names, weights, dtype))
    told = [*_told(weights, config, limits, options.dtype), f"statistics: {', '.join(action_config)}, from {told_by}"]
    if mode.untold_prefix is not None and _told_prefix(recipe, options) is None:
        told.append(
            f"prefixes: no async_train says whether the run trained with them, so {config.head.max_prefix} as for the "
            f"{mode.whose}; --max-prefix if it did otherwise"
        )
    told.append(f"states of an observation: {states}, {states_by}")
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


def copy_tokenizer(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, target / file.name)


def _mode(weights: Weights, family: str, recipe: Recipe | None, options: ImportOptions) -> Mode:
    modes = MODES[family]
    name = options.mode
    if name is None and weights.is_run:
        runs = [key for key, mode in modes.items() if mode.of_runs]
        # Of several it is the first whose configuration has statistics in this place.
        name = runs[0] if len(runs) == 1 or (recipe and recipe.has_statistics) else None
    if name is None:
        choices = " or ".join(f"--mode {key} ({described(mode)})" for key, mode in modes.items())
        raise ValueError(
            f"mode: nothing says for which code of {FAMILIES[family].title} {weights.files[0]} was made: {choices}"
        )
    if name not in modes:
        raise ValueError(f"mode: expected {' or '.join(modes)}, got {name!r}")
    mode = modes[name]
    trained = recipe.model.get("local_window") if recipe and mode.local_window is not None else None
    if isinstance(trained, int):
        mode = replace(mode, local_window=trained)
    given = {key: getattr(options, key) for key in ("local_window", "position_offset")}
    return replace(mode, **{key: value for key, value in given.items() if value is not None})


def _configured(
    config: ModelConfig, mode: Mode, recipe: Recipe | None, options: ImportOptions, state_length: int
) -> ModelConfig:
    """The checkpoint's configuration in the mode."""
    told = (_told_prefix(recipe, options), mode.untold_prefix, config.head.max_prefix)
    head = replace(
        config.head,
        local_window=mode.local_window,
        position_offset=mode.position_offset,
        state_length=state_length,
        max_prefix=next(length for length in told if length is not None),
    )
    return replace(config, head=head, std_epsilon=mode.std_epsilon, normalize_instruction=mode.normalize_instruction)


def _told_prefix(recipe: Recipe | None, options: ImportOptions) -> int | None:
    """The longest that the run has seen, by the option or its configuration; None where neither says."""
    is_async = recipe.model.get("async_train") if recipe else None
    if options.max_prefix is not None or not isinstance(is_async, bool):
        return options.max_prefix
    return TRAINED_PREFIX if is_async else 0


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
    if mode.of_runs and len(action_config) > 1:
        raise ValueError(
            f"robot_type: a released run trains one robot, {file} holds {', '.join(action_config)}: "
            "choose by --robot-type"
        )
    return {name: entry_in(mode, file, name, entry) for name, entry in action_config.items()}, file


def _write_video_settings(folder: Path, target: Path, config: ModelConfig, is_vlm: bool) -> None:
    """As in the checkpoint of the same model; beside a VLM, which has videos resized, as the released benchmark
    checkpoints have them (spec section 8)."""
    if not is_vlm:
        found = find_video_settings(folder)
        if found is not None:
            (target / VIDEO_FILE).write_text(json.dumps(found[1]), encoding="utf-8")
        return
    vision = config.vision
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    settings = {"do_resize": False, **sizes, "temporal_patch_size": vision.temporal_patch_size}
    (target / VIDEO_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _check_statistics(target: Path, config: ModelConfig, told_by: Path) -> None:
    try:
        found = load_statistics(target, config.head.action_dim, config.std_epsilon, config.double_statistics)
        check_states(target / STATISTICS_FILE, found, config.head.state_dim)
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


def _told(weights: Weights, config: ModelConfig, limits: ImageLimits, dtype: str) -> Iterator[str]:
    head = config.head
    stored = sorted({str(it.dtype).removeprefix("torch.") for it in weights.tensors.values()})
    yield f"weights: {', '.join(str(file) for file in weights.files)}, {' and '.join(stored)} -> {dtype}"
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
    sizes = f"{limits.min_pixels:,} to {limits.max_pixels:,} pixels" if limits.resize else "in the size they come in"
    yield f"images: {sizes}"
