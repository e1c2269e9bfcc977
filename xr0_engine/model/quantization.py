"""What of a checkpoint is in 8 bits, and how: recipes, and the file by which a folder tells it.

Weights are symmetric, with a scale for each output. A layer of format int8 or fp8 multiplies 8-bit rows by 8-bit
weights; each row of its input is scaled by its own largest magnitude when it is there, so that nothing is calibrated.
One of format int8-weights is stored so and multiplied in 16 bits: what reads few rows, the flow's layers above all, is
bound by reading its weight, and gains nothing from more. An export's scales are constants; for it the largest inputs
that were seen are kept, of the action head's layers by flow step: each step has a time, and a range, of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from xr0_engine.files import is_number, read_json, reading, section, text, whole
from xr0_engine.kernels import reference
from xr0_engine.types import CheckpointError

Format = Literal["int8", "fp8", "int8-weights"]
FORMATS: tuple[str, ...] = get_args(Format)
WEIGHT_DTYPES: Mapping[str, torch.dtype] = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int8-weights": torch.int8,
}
ROW_FORMATS = ("int8", "fp8")
"""Those whose rows have 8 bits too."""
QUANTIZATION_FILE = "quantization.json"
VERSION = 2
MOST = {format: reference.MOST[dtype] for format, dtype in WEIGHT_DTYPES.items()}
"""Format -> what a row's largest magnitude becomes; in an export the constant that stands in its place."""
SCALE = "weight_scale"
"""Behind a layer's name: its weight's scales, (N,) float32."""

VLM_LAYER = re.compile(
    r"vlm\.model\.(visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
    r"|visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
    r"|language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))"
)
HEAD_LAYER = re.compile(r"dit\.layers\.\d+\.(attn\.(qkv_proj|o_proj)|mlp\.(gate|up|down)_proj)")
"""Layers that recipes quantise, by their names in a checkpoint. Embeddings, the projectors of state, actions and time,
and the output layer stay as they are: they are small, and what they get wrong reaches the robot unaveraged."""

PARTS = (VLM_LAYER, HEAD_LAYER)
SHARED_INPUT = re.compile(r"(.+\.(?:self_attn|mlp)\.)(?:q|k|v|gate|up)_proj")
SHARING = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""Layers that read one input, which kernels multiply at once."""

Formats = tuple[Format | None, Format | None]
"""Of the VLM's layers and of the action head's; None: 16 bits."""

RECIPES: Mapping[str, tuple[Format, Format]] = {
    "int8": ("int8", "int8-weights"),
    "fp8": ("fp8", "int8-weights"),
    "int8-weights": ("int8-weights", "int8-weights"),
    "int8-all": ("int8", "int8"),
    "fp8-all": ("fp8", "fp8"),
}
"""Recipe -> formats of the VLM's layers and of the action head's."""


@dataclass(frozen=True)
class Quantization:
    """layers: name in the checkpoint -> format; layers that are not in it stay in 16 bits. source_sha256: of the
    checkpoint that it was made of (exported/manifest.py: checkpoint_hash); source: that one's name. largest: layer ->
    the largest magnitudes of its input that were seen when it was compared, of the action head's layers one for each
    flow step, else one: what an export, whose scales are constants, rounds by; empty if nothing was compared."""

    recipe: str
    layers: Mapping[str, Format]
    source: str = ""
    source_sha256: str = ""
    largest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        told = {
            "version": VERSION,
            "recipe": self.recipe,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "layers": dict(self.layers),
            "largest": {layer: list(values) for layer, values in self.largest.items()},
        }
        (folder / QUANTIZATION_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    def check_largest(self, folder: Path, flow_steps: int) -> None:
        """Raises CheckpointError, which names the file in `folder`, if an export of a flow of so many steps lacks what
        it rounds by."""
        where, remedy = folder / QUANTIZATION_FILE, "make it with `xr0 quantize --calibrate EPISODES`"
        rounding = [layer for layer, format in self.layers.items() if format in ROW_FORMATS]
        missing = [layer for layer in rounding if layer not in self.largest]
        if missing:
            raise CheckpointError(
                f"{where}: largest: {len(missing)} layers, {missing[0]} the first, have no largest input, by which an "
                f"export rounds: {remedy}"
            )
        for layer in rounding:
            in_head = HEAD_LAYER.fullmatch(layer) is not None
            if (found := len(self.largest[layer])) != (flow_steps if in_head else 1):
                expected = f"{flow_steps} magnitudes, one for each flow step" if in_head else "one magnitude"
                raise CheckpointError(f"{where}: largest, {layer}: expected {expected}; got {found}: {remedy}")


def find_recipe(name: str) -> tuple[Format, Format]:
    """Raises ValueError that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"quantize: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def quantized_layers(recipe: str, names: Iterable[str]) -> dict[str, Format]:
    """Layer -> format, of a model whose tensors have these names. Raises ValueError for an unknown recipe."""
    return formatted_layers(find_recipe(recipe), names)


def formatted_layers(formats: Formats, names: Iterable[str]) -> dict[str, Format]:
    """As quantized_layers. formats: of the VLM's layers and of the action head's."""
    layers: dict[str, Format] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        for pattern, format in zip(PARTS, formats, strict=True):
            if kind == "weight" and format is not None and pattern.fullmatch(layer):
                layers[layer] = format
    return layers


def format_pairs(layers: Mapping[str, Format]) -> list[Formats]:
    """The formats that the VLM's layers have, and the head's, in as few pairs as have all of them."""
    of_vlm, of_head = ({format for layer, format in layers.items() if part.fullmatch(layer)} for part in PARTS)
    vlm, head = (list[Format | None](sorted(each)) or [None] for each in (of_vlm, of_head))
    return [
        (vlm[min(place, len(vlm) - 1)], head[min(place, len(head) - 1)]) for place in range(max(len(vlm), len(head)))
    ]


def shared_input(layer: str) -> str:
    """What layers that read one input have in common, and other layers with nobody."""
    match = SHARED_INPUT.fullmatch(layer)
    return layer if match is None else match[1]


def mixed_layers(layers: Mapping[str, Format], text_layers: int) -> list[str]:
    """Of a model with so many text layers, the first that read one input and have several formats; empty if none do."""
    last = f".{text_layers - 1}.self_attn."
    for prefix in dict.fromkeys(shared_input(layer) for layer in layers if SHARED_INPUT.fullmatch(layer)):
        names = SHARING["mlp" if prefix.endswith("mlp.") else "self_attn"]
        # Of the last layer keys and values alone are computed.
        whole = [prefix + name for name in names if not (name == "q_proj" and prefix.endswith(last))]
        if len({layers.get(layer) for layer in whole}) > 1:
            return whole
    return []


def read_quantization(folder: Path) -> Quantization | None:
    """What a checkpoint's folder tells; None of one that is not quantised. Raises CheckpointError."""
    path = folder / QUANTIZATION_FILE
    if not path.is_file():
        return None
    told = read_json(path)
    with reading(path):
        if not isinstance(told, dict):
            raise TypeError("expected an object")
        if (version := whole(told, "version")) != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {version}: make the folder anew with `xr0 quantize`")
        given = section(told, "layers")
        if not given:
            raise ValueError("layers: expected at least one; remove the file from a checkpoint that has none in 8 bits")
        layers = {layer: text(given, layer) for layer in given}
        for layer, found in layers.items():
            if found not in FORMATS:
                raise ValueError(f"layers, {layer}: expected one of {', '.join(FORMATS)}, got {found!r}")
            if not (VLM_LAYER.fullmatch(layer) or HEAD_LAYER.fullmatch(layer)):
                raise ValueError(f"layers: expected names of layers that can be quantised, got {layer!r:.120}")
        largest = {}
        for layer, values in section(told, "largest").items():
            if layer not in layers:
                raise ValueError(f"largest: expected quantised layers, got {layer!r:.120}")
            if not isinstance(values, list) or not values or not all(is_number(each) and each > 0 for each in values):
                raise ValueError(f"largest, {layer}: expected a list of magnitudes above 0, got {values!r:.80}")
            largest[layer] = tuple(map(float, values))
        formats = cast(dict[str, Format], layers)
        return Quantization(text(told, "recipe"), formats, text(told, "source"), text(told, "source_sha256"), largest)


def refuse_quantized(folder: Path) -> None:
    """For those who need the weights themselves. Raises CheckpointError."""
    quantization = read_quantization(folder)
    if quantization is not None:
        raise CheckpointError(
            f"{folder} is quantised (recipe {quantization.recipe}): its weights are rounded to 8 bits; take the "
            f"checkpoint that it was made of, {quantization.source or 'in 16 bits'}"
        )
