"""Checkpoint files -> model parameters: strict, streamed, safetensors only (spec sections 2.1 and 3.5).

Model parameters carry the checkpoint's names, but for the prefix `head.` that the action head's have in the model.
Training checkpoints put `model.` before every name; both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xr0_engine.config import ModelConfig
from xr0_engine.family import FAMILIES, named_family
from xr0_engine.files import parse_json, pointer_fault, read_bytes, reading, section, text
from xr0_engine.hub import fetch, hub_id
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.quantization import (
    SCALE,
    WEIGHT_DTYPES,
    Format,
    quantized_layers,
    read_quantization,
    refuse_quantized,
)
from xr0_engine.model.quantized import QuantizedLinear, put_quantized
from xr0_engine.model.vlm import VLM
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.part_configs import least_parameters
from xr0_engine.types import CheckpointError, FileError

INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter.json"
"""In a folder that holds what was changed of a base alone (adapter.py)."""
TIED_LM_HEAD = "vlm.lm_head.weight"
TRAINING_PREFIX = "model."
VLM_PREFIX = "vlm."
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
QUANTIZED_DTYPES = {**DTYPES, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
READ_WINDOW = 256 * 2**20
"""Bytes read through one memory map before it is reopened: a map's pages count as resident until it is closed."""
MAX_NAMED = 12
"""Faults listed in one error before "and N more"."""
MORE_THAN_STORED = 4
"""How many times what is stored a configuration may describe and still have its missing tensors named one by one."""
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor. key: its name in the file, training prefix included."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


def resolve_checkpoint(path: str | Path) -> Path:
    """A local folder, or the local copy of a Hugging Face hub id, `organisation/name` or with a revision
    `organisation/name@revision`, downloaded if need be. Raises CheckpointError that says what to do."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file; expected a checkpoint folder with config.json and *.safetensors")
    wanted = hub_id(path)
    if wanted is None:
        raise CheckpointError(f"there is no checkpoint folder {path}")
    try:
        return fetch("model", wanted, HUB_FILES)
    except FileError as error:
        raise CheckpointError(str(error)) from None


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a complete checkpoint, without the tied LM head."""
    with torch.device("meta"):
        vlm, head = VLM(config, complete=True), ActionHead(config)
    return {f"vlm.{name}": tuple(p.shape) for name, p in vlm.named_parameters()} | head_shapes(head)


def head_shapes(head: ActionHead) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in head.named_parameters()}


def read_index(folder: Path, quantized: bool = False) -> dict[str, StoredTensor]:
    """Checkpoint name -> place, from the headers of the folder's safetensors files.

    quantized: whether the caller knows what to do with one that is. Raises CheckpointError that names every file that
    is missing, truncated or corrupt.
    """
    if not quantized:
        refuse_quantized(folder)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} is an adapter and holds no base: Engine.from_pretrained(BASE, adapter={str(folder)!r}) runs it, "
            f"`xr0 convert {folder} --like BASE --out DIR` makes one folder of both"
        )
    index = folder / INDEX_FILE
    if index.is_file():
        data = read_bytes(index)
        with reading(f"{index} is corrupt"):
            content = parse_json(data)
            if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
                raise ValueError("expected JSON with a `weight_map`")
            weight_map = section(content, "weight_map")
            names = sorted({text(weight_map, key) for key in weight_map})
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise CheckpointError(f"{index} names files that are no safetensors of this folder: {', '.join(outside)}")
        files = [folder / name for name in names]
    else:
        weight_map = {}
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors weights (other formats are not read)")
    stored, faults = read_headers(files, QUANTIZED_DTYPES if quantized else DTYPES)
    if not faults:
        for key, file in weight_map.items():
            place = stored.get(_plain(key))
            if place is None or place.file.name != file:
                faults.append(f"{key} is not in {file}, where the index has it")
    raise_if(faults, f"checkpoint {folder} cannot be read")
    return stored


def read_headers(
    files: Iterable[Path], dtypes: Mapping[str, torch.dtype] = DTYPES
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of some safetensors files, and the faults found. dtypes: those that may be there."""
    stored: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for file in files:
        if not file.is_file():
            faults.append(f"file {file.name} is missing")
            continue
        pointer = pointer_fault(file)
        if pointer:
            faults.append(pointer)
            continue
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (the handle is no dictionary)
                    part = handle.get_slice(key)
                    name, dtype = _plain(key), part.get_dtype()
                    if name in stored:
                        faults.append(f"{name} is stored twice, in {stored[name].file.name} and {file.name}")
                    elif dtype not in dtypes:
                        faults.append(f"{name} has dtype {dtype}; expected one of {', '.join(dtypes)}")
                    else:
                        stored[name] = StoredTensor(file, key, tuple(part.get_shape()), dtypes[dtype])
        except SafetensorError as error:
            faults.append(f"file {file.name} is truncated or corrupt ({error})")
    return stored, faults


def read_tensor(place: StoredTensor) -> Tensor:
    """One tensor of a checkpoint, as stored, through a short-lived map: a map's pages count as resident until it is
    closed."""
    with safe_open(place.file, framework="pt") as handle:
        return handle.get_tensor(place.key)


def check_tensors(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Raises one CheckpointError that names missing, unexpected and wrongly shaped tensors.

    optional: those that a checkpoint has all of or none, as those of training alone.
    """
    if optional.keys() & stored.keys():
        expected = {**expected, **optional}
    faults = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    faults += [f"unexpected {name}" for name in stored if name not in expected and name != TIED_LM_HEAD]
    faults += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    raise_if(faults, "the weights do not fit config.json")


def check_model(config: ModelConfig, stored: Mapping[str, StoredTensor], complete: bool = True) -> None:
    """check_tensors for all that config describes; complete: False for its VLM alone.

    Raises CheckpointError, before any module is made, where config describes a model of another order of size.
    """
    least = least_parameters(config.text, config.vision, config.head if complete else None)
    held = sum(place.num_elements for place in stored.values())
    if least > MORE_THAN_STORED * held:
        raise CheckpointError(
            f"config.json describes a model of at least {least:,} parameters, the files hold {held:,}: its sizes "
            "(layers, widths, vocab_size) are not those of these weights"
        )
    named = named_family(stored)
    if complete and named is not None and named != config.family:
        ours, theirs = FAMILIES[config.family].title, FAMILIES[named].title
        raise CheckpointError(
            f"the weights do not fit config.json: it describes the action head of {ours}, they are named as those of "
            f"{theirs} are: this folder holds the files of two models"
        )
    shapes = checkpoint_shapes(config)
    wanted = shapes if complete else {n: s for n, s in shapes.items() if n.startswith(VLM_PREFIX)}
    check_tensors(stored, wanted, choice_shapes(config) if complete else {})


def load_model(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    layers: Mapping[str, Format] = MappingProxyType({}),
    quantized: bool = False,
    changes: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> XR0Model:
    """A model with every parameter read from the checkpoint. Checks all names and shapes before reading any tensor.

    quantized: whether the checkpoint is. layers: those of it that are, and their formats; of one in 16 bits, those to
    quantise now. changes: name -> what is made of that tensor as it comes.
    """
    check_stored(config, stored, layers, quantized)
    model = allocated(config, device, dtype, layers)
    fill_parameters(model, stored, changes)
    model.finish_loading()
    return model


def check_stored(
    config: ModelConfig, stored: Mapping[str, StoredTensor], layers: Mapping[str, Format], quantized: bool
) -> None:
    """check_model, or of a checkpoint that is quantised check_quantized. As load_model has its arguments."""
    if quantized and layers:
        check_quantized(config, stored, layers)
    else:
        check_model(config, stored)


def allocated(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    layers: Mapping[str, Format] = MappingProxyType({}),
) -> XR0Model:
    """A model without values, to be filled. layers: of those that it has, the ones in 8 bits."""
    model = _unfilled(config, layers)
    model.allocate(device, dtype)
    return model


def _unfilled(config: ModelConfig, layers: Mapping[str, Format]) -> XR0Model:
    """A model without memory. Raises CheckpointError for layers that it has not."""
    with torch.device("meta"):
        model = XR0Model(config)
        try:
            put_quantized(model, layers)
        except AttributeError as fault:
            raise CheckpointError(f"layers: not of the model that config.json describes: {fault}") from None
    return model


def inference_shapes(
    config: ModelConfig, layers: Mapping[str, Format] = MappingProxyType({})
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that inference reads, all that a checkpoint whose `layers` are quantised holds.
    Raises CheckpointError for layers that the model has not."""
    return {n.removeprefix("head."): tuple(p.shape) for n, p in _unfilled(config, layers).named_parameters()}


def layers_in_8bit(folder: Path, config: ModelConfig, recipe: str | None = None) -> Mapping[str, Format]:
    """The layers of a checkpoint that are quantised, or shall be by a recipe. Raises CheckpointError; ValueError for a
    recipe that is unknown, or of a checkpoint that is quantised already."""
    stored = read_quantization(folder)
    if recipe is None:
        return {} if stored is None else stored.layers
    layers = quantized_layers(recipe, inference_shapes(config))
    if stored is not None:
        raise ValueError(f"quantize: {folder} is quantised already (recipe {stored.recipe}): leave the argument out")
    return layers


def check_quantized(
    config: ModelConfig, stored: Mapping[str, StoredTensor], layers: Mapping[str, Format]
) -> dict[str, tuple[int, ...]]:
    """As check_model, of a checkpoint whose `layers` are quantised; it lacks what inference does not read. Returns the
    tensors' shapes."""
    shapes = inference_shapes(config, layers)
    check_tensors(stored, shapes)
    eight, faults = {torch.int8, torch.float8_e4m3fn}, []
    for name in shapes:
        layer, _, kind = name.rpartition(".")
        found, format = stored[name].dtype, layers.get(layer)
        if kind == "weight" and format is not None:
            if found != WEIGHT_DTYPES[format]:
                faults.append(f"{name} has dtype {found}, expected {WEIGHT_DTYPES[format]} for format {format}")
        elif kind == SCALE and found != torch.float32:
            faults.append(f"{name} has dtype {found}, expected torch.float32")
        elif found in eight:
            faults.append(f"{name} has dtype {found}; its layer is not among the quantised ones")
    raise_if(faults, "the weights do not fit quantization.json")
    return shapes


def fill_parameters(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    changes: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> None:
    """Copy every parameter of model from its file, one file after the other, through short-lived memory maps.

    Weights of quantised layers that are stored in more than 8 bits are quantised as they come. changes: as load_model.
    """
    targets = fillings(model, stored)
    order = sorted(targets, key=lambda name: (stored[name].file, stored[name].key))
    total = sum(stored[name].num_bytes for name in order)
    console = Console(stderr=True)
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=total)
        for file, names in _windows(order, stored):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in names:
                        value = handle.get_tensor(stored[name].key)
                        targets[name](changes[name](value) if name in changes else value)
                        progress.advance(task, stored[name].num_bytes)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from None


def fillings(model: nn.Module, stored: Container[str] = ()) -> dict[str, Callable[[Tensor], object]]:
    """Name in a checkpoint, in the model's order -> what takes that tensor. Weights of quantised layers whose scales
    are not stored are quantised as they come."""
    targets = {name.removeprefix("head."): _filling(parameter) for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        layer = path.removeprefix("head.")
        if isinstance(module, QuantizedLinear) and f"{layer}.{SCALE}" not in stored:
            targets[f"{layer}.weight"] = module.take
            del targets[f"{layer}.{SCALE}"]
    return targets


def _filling(parameter: nn.Parameter) -> Callable[[Tensor], object]:
    return parameter.data.copy_


def _windows(order: list[str], stored: Mapping[str, StoredTensor]) -> Iterable[tuple[Path, list[str]]]:
    """Neighbouring tensors of one file, at most READ_WINDOW bytes (or one tensor) at a time."""
    names: list[str] = []
    size = 0
    for name in order:
        place = stored[name]
        if names and (place.file != stored[names[0]].file or size + place.num_bytes > READ_WINDOW):
            yield stored[names[0]].file, names
            names, size = [], 0
        names.append(name)
        size += place.num_bytes
    if names:
        yield stored[names[0]].file, names


def _plain(key: str) -> str:
    return key.removeprefix(TRAINING_PREFIX)


def raise_if(faults: list[str], what: str) -> None:
    """Raises CheckpointError with the first of them and how many more there are."""
    if faults:
        more = [f"and {len(faults) - MAX_NAMED} more"] if len(faults) > MAX_NAMED else []
        raise CheckpointError(f"{what}: " + "; ".join(faults[:MAX_NAMED] + more))
