"""The families of action heads: which one a checkpoint is of, and what its config.json leaves unsaid.

Xiaomi-Robotics-0 and Xiaomi-Robotics-1 come as the same files. What differs is told by the weights' names and shapes
(docs/spec.md, Xiaomi-Robotics-1); here they become keys of config.json, and nobody else asks which family it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xr0_engine.types import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Name as stored -> shape."""

VARIANT = {"stream_norms": True, "mlp_width": None, "output_width": None}
"""Keys of dit_config that only other families than XR-0 have, and what XR-0 has in their place."""
OFFSETS = ("position_offset", "inference_action_position_offset")
"""Our key, and that of a community's converter for the same."""
WRAPPERS = ("model.", "module.")
"""What training code puts before every name."""
STREAM_NORM = ".middle_layernorm."
"""In the names of XR-0's layers, and never in XR-1's."""
LAYERS = "dit.layers."
GATE = "dit.layers.0.mlp.gate_proj.weight"
OUTPUT = "action_output_layer.layers.0.weight"
ACTION_TOKENS = 60
"""Tokens <a_0>, <a_1>, ... of a family whose language model proposes chunks in training: XR-1's columns."""
CHOICE_OFFSETS = {"<score>": 14, "<state>": 15, **{f"<a_{index}>": 16 + index for index in range(ACTION_TOKENS)}}
"""Ids of the tokens that training alone sends, from that of <|image_pad|>: 151669 to 151730 in Qwen's numbering."""
CHOICE = ("_projector_choice.", "vlm.model.action_embed.", "vlm.model.score_embed.")
"""In the names of the tensors that only training has."""


@dataclass(frozen=True)
class Family:
    """title: of the model. model_type: what config.json says of it. choices: candidates that its language model
    proposes in training, 0 if it never does. normalize_instruction: as in ModelConfig, where config.json is silent.
    double_statistics: its released clients decode in float64, and rounding the tables to float32 changed episodes.
    fresh_std: of new weights, whose biases are then 0 and norms 1; None: as torch makes them, as nothing is published.
    """

    title: str
    model_type: str
    choices: int
    normalize_instruction: bool
    double_statistics: bool
    fresh_std: float | None = None


FAMILIES = {
    "xr0": Family("Xiaomi-Robotics-0", "xiaomi_robotics_0", 0, True, False),
    "xr1": Family("Xiaomi-Robotics-1", "mibot", 5, False, True, fresh_std=0.02),
}


def family_of(stream_norms: bool) -> str:
    """A key of FAMILIES."""
    return "xr0" if stream_norms else "xr1"


def named_family(names: Iterable[str]) -> str | None:
    """The family that a checkpoint's tensors are named for; None where none of them is a DiT layer's."""
    layers = [name for name in names if name.removeprefix("model.").startswith(LAYERS)]
    return family_of(any(STREAM_NORM in name for name in layers)) if layers else None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in a folder's safetensors files, from their headers; files that cannot be read are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as handle:
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            continue
    return shapes


def needs_shapes(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json leaves to the weights which family it is of: other code than ours has written it."""
    dit = hf.get("dit_config")
    ours = hf.get("model_type") == FAMILIES["xr0"].model_type
    return not ours and isinstance(dit, Mapping) and not VARIANT.keys() & dit.keys()


def completed(hf: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """A config.json that says all of VARIANT and position_offset.

    shapes: of the checkpoint's tensors; none where they are not at hand: then model_type alone tells. Raises
    CheckpointError where XR-1's offset is neither stated nor known.
    """
    dit = dict(hf["dit_config"])
    if not VARIANT.keys() & dit.keys():
        dit = {**_variant(hf, dit, shapes), **dit}
    return {**hf, "dit_config": dit, **_offset(hf, dit, shapes)}


def _variant(hf: Mapping[str, Any], dit: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    plain = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    named = named_family(plain)
    if named is None:
        is_xr1 = hf.get("model_type") == FAMILIES["xr1"].model_type
        return {"stream_norms": False, "output_width": dit.get("hidden_size")} if is_xr1 else {}
    hidden = dit.get("hidden_size")
    usual = {GATE: 4 * hidden if isinstance(hidden, int) else None, OUTPUT: hf.get("action_dim")}
    widths = {name: plain[name][0] for name in (GATE, OUTPUT) if plain.get(name)}
    mlp, output = (None if widths.get(name) == usual[name] else widths.get(name) for name in (GATE, OUTPUT))
    return {"stream_norms": named == "xr0", "mlp_width": mlp, "output_width": output}


def _offset(hf: Mapping[str, Any], dit: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """position_offset, of XR-1: as stated under one of OFFSETS, or what the released benchmark checkpoints have, 0."""
    stated = {key: hf[key] for key in OFFSETS if hf.get(key) is not None}
    if len(set(map(repr, stated.values()))) > 1:
        raise CheckpointError(
            "config.json: " + ", ".join(f"{key} is {value!r:.40}" for key, value in stated.items()) + ": keep one"
        )
    if stated:
        return {"position_offset": next(iter(stated.values()))}
    if dit.get("stream_norms", True) is not False:
        return {}
    trained = [name for name in shapes if name.startswith(WRAPPERS) or any(part in name for part in CHOICE)]
    if trained or not needs_shapes(hf):
        why = f"weights of a training run ({trained[0]})" if trained else "no released benchmark checkpoint"
        raise CheckpointError(
            f"config.json lacks position_offset, and this is {why}, of which nothing says where its actions stand: add "
            '"position_offset": 10 if the post-training code trained it, 0 if it was trained as the released '
            "benchmark checkpoints were"
        )
    return {"position_offset": 0}
