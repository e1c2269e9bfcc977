"""Files of torch.save to tensors by name, without running code: what the released training leaves behind.

A run of it is a folder of steps, each a folder of DeepSpeed's: `RUN/NAME.ckpt/checkpoint/` with Lightning around it,
`RUN/global_stepN/` without, and a file `latest` that names the newest. A step's weights are in
`mp_rank_00_model_states.pt` under `module`, whole and in bfloat16, as the released server reads them. The float32
masters are spread over `*_optim_states.pt`, between objects of DeepSpeed's own that cannot be read without running its
code: they are left alone. DeepSpeed's zero_to_fp32.py merges them into `pytorch_model*.bin` or `model*.safetensors`,
which can be read.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xr0_engine.files import FAULTS, one_line, read_json, refuse_pointer
from xr0_engine.model.weights import DTYPES, INDEX_FILE, MAX_NAMED
from xr0_engine.types import CheckpointError

MODEL_STATES = "mp_rank_00_model_states.pt"
LATEST = "latest"
LIGHTNING_STEP = "checkpoint"
"""The step's folder within a checkpoint of Lightning's."""
LIGHTNING_STEPS = "checkpoints"
"""The folder that Lightning puts steps into where nobody names another."""
SERVED_STEP = "last.ckpt"
"""What the released server takes of a run."""
MERGED = ("pytorch_model.bin", "model.safetensors")
MERGED_INDEX = ("pytorch_model.bin.index.json", INDEX_FILE)
HOLDERS = ("module", "state_dict", "model")
"""Keys under which a file may keep its weights."""
MOST_HOLDERS = 8
"""In each other."""
PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.")
"""What wrappers of a model put before every name."""
RUN_KEYS = ("ds_version", "ds_config", "param_shapes", "global_steps")
"""Keys that a training state has, and a converter's output has not."""


@dataclass(frozen=True)
class Weights:
    """files: what was read. tensors: by name, no wrapper's prefix before it, still in the files, not in memory.

    is_run: the state of a training run, not what a converter has made of it.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    is_run: bool


def read_weights(source: Path, step: str | None = None) -> Weights:
    """The weights of a released run's folder, of one of its steps, or of files of torch.save or safetensors.

    step: a name or number among the folder's steps; None: the one that `latest` names, else last.ckpt, else the only
    one. Raises CheckpointError that names the file and the remedy.
    """
    files = _find(source, step)
    tensors: dict[str, Tensor] = {}
    is_run = False
    for file in files:
        content = _load(file)
        is_run = is_run or (isinstance(content, Mapping) and any(key in content for key in RUN_KEYS))
        state = _state_dict(content, file)
        twice = sorted(tensors.keys() & state.keys())
        if twice:
            raise CheckpointError(f"{file} holds {twice[0]}, which an earlier file of {source} holds too")
        tensors |= state
    return Weights(files, _without_prefix(tensors), is_run)


def _find(source: Path, step: str | None) -> tuple[Path, ...]:
    if source.is_file():
        if step is not None:
            raise ValueError(f"step: {source} is one file; steps are chosen in a run's folder")
        return (source,)
    if not source.is_dir():
        raise CheckpointError(f"there is no file or folder {source}")
    steps = _steps(source)
    if steps:
        chosen = _choose(source, steps, step)
        if chosen.with_name("mp_rank_01_model_states.pt").exists():
            raise CheckpointError(
                f"{chosen.parent} is split by model parallelism, which the released training never is"
            )
        return (chosen,)
    merged = () if (source / "config.json").is_file() else _merged(source)
    if not merged:
        raise CheckpointError(_nothing_found(source))
    return merged


def _merged(source: Path) -> tuple[Path, ...]:
    """The files that zero_to_fp32.py wrote into a folder, if any."""
    for index in (source / name for name in MERGED_INDEX):
        if index.is_file():
            weight_map = _mapping(read_json(index)).get("weight_map")
            names = sorted({str(name) for name in _mapping(weight_map).values()})
            if not names or any(Path(name).name != name for name in names):
                raise CheckpointError(f"{index}: expected a `weight_map` to files of this folder")
            return tuple(source / name for name in names)
    return next(((source / name,) for name in MERGED if (source / name).is_file()), ())


def _steps(source: Path) -> dict[str, Path]:
    """Name -> file of weights, of every step in the folder; the empty name if the folder is itself a step."""
    found = {}
    for pattern in (MODEL_STATES, f"*/{MODEL_STATES}", f"*/{LIGHTNING_STEP}/{MODEL_STATES}"):
        for file in sorted(source.glob(pattern)):
            parts = file.relative_to(source).parts
            found["" if len(parts) == 1 else parts[0]] = file
    return found or (_steps(source / LIGHTNING_STEPS) if (source / LIGHTNING_STEPS).is_dir() else {})


def _choose(source: Path, steps: Mapping[str, Path], step: str | None) -> Path:
    known = f"{source} holds the steps {', '.join(sorted(steps))}"
    if step is not None:
        for name in (step, f"global_step{step}", f"{step}.ckpt"):
            if name in steps:
                return steps[name]
        # Lightning's own names: epoch=0-step=1000.ckpt.
        named = [name for name in steps if re.fullmatch(rf"(.*\W)?step={re.escape(step)}(\W.*)?", name)]
        if len(named) == 1:
            return steps[named[0]]
        raise ValueError(f"step: expected one of {', '.join(filter(None, sorted(steps))) or 'none'}, got {step!r}")
    if "" in steps:
        return steps[""]
    latest = source / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if name not in steps:
            raise CheckpointError(
                f"{latest} names {name!r:.80}, which holds no {MODEL_STATES}; {known}: choose by --step"
            )
        return steps[name]
    if SERVED_STEP in steps:
        return steps[SERVED_STEP]
    if len(steps) > 1:
        raise CheckpointError(f"{known}, and no file `{LATEST}` or {SERVED_STEP} says which is meant: choose by --step")
    return next(iter(steps.values()))


def _nothing_found(source: Path) -> str:
    if any(any(source.glob(f"{folders}zero_pp_rank_*_model_states.pt")) for folders in ("", "*/", "*/*/")):
        return (
            f"{source} holds weights split by ZeRO-3, which the released recipe does not use: merge them with the "
            f"zero_to_fp32.py beside them, and give the file that it writes"
        )
    if (source / INDEX_FILE).is_file() or any(source.glob("*.safetensors")):
        return (
            f"{source} holds safetensors, as a checkpoint that the engine loads as it is. To write it for the released "
            f"code: --to released or --to released-pt"
        )
    return (
        f"{source} is no folder of a released training run: no step with {MODEL_STATES}, no {MERGED[0]}. Give the "
        f"run's folder, the folder of one step, or a file of weights itself"
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"file {file} is missing")
    refuse_pointer(file)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error})") from None
    if not _is_zip(file):
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is truncated, or no file of torch.save: compare its size with the "
            "original's and copy it again; a file of torch before 1.6 must be saved again by a newer one"
        )
    try:
        with warnings.catch_warnings():
            # Of what it will not read, the error below tells.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_foreign(file, error)) from None
    except (*FAULTS, RuntimeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read: {_first_line(error)}") from None


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        # What some versions of Python say of one whose end is damaged.
        return False


def _foreign(file: Path, error: Exception) -> str:
    """What to tell of a file that asks for code to be run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (*FAULTS, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
        names = []
    told = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
    what = ", ".join(sorted(names)[:MAX_NAMED]) or (told[1] if told else "an instruction that weights have no need of")
    return (
        f"{file} holds more than tensors and plain values ({what}), and to read that is to run code that the file "
        "chooses. Nothing of it was run. If you trust it, save its weights alone where the released code is installed: "
        f"state = torch.load({file.name!r}, map_location='cpu', weights_only=False); "
        "torch.save({'module': state['module']}, 'weights.pt'); then convert weights.pt"
    )


def _first_line(error: Exception) -> str:
    return one_line(Exception((str(error).splitlines() or [type(error).__name__])[0]))


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    # It may hold itself.
    for _ in range(MOST_HOLDERS):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in HOLDERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        kind = "an empty one" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{file}: expected a state dict, by itself or under {', '.join(HOLDERS)}; got {kind}")
    odd = [f"{name!r:.80} is {_kind(value)}" for name, value in content.items() if not _is_weight(name, value)]
    if odd:
        more = [f"and {len(odd) - MAX_NAMED} more"] if len(odd) > MAX_NAMED else []
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise CheckpointError(f"{file}: expected tensors of {expected}: " + "; ".join(odd[:MAX_NAMED] + more))
    return dict(content)


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.dtype in DTYPES.values()


def _kind(value: Any) -> str:
    return f"of {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else type(value).__name__


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names: Iterable[str] = tensors
    while prefix := next((it for it in PREFIXES if all(name.startswith(it) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, tensors.values(), strict=True))
