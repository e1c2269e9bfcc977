"""Frozen model configuration, read from and written to config.json in one place each (spec section 3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xr0_engine.family import (
    CHOICE_OFFSETS,
    FAMILIES,
    OFFSETS,
    VARIANT,
    Shapes,
    completed,
    family_of,
    needs_shapes,
    stored_shapes,
)
from xr0_engine.files import FAULTS, flag, number, one_line, read_json, section, whole
from xr0_engine.part_configs import (
    STD_EPSILON,
    TRAINED_PREFIX,
    ActionHeadConfig,
    TextConfig,
    TokenIds,
    VisionConfig,
    out_of_range,
)
from xr0_engine.types import CheckpointError

__all__ = [
    "HEAD_SIZES",
    "TRAINED_PREFIX",
    "VISION_ROPE_THETA",
    "VLM_TYPE",
    "ActionHeadConfig",
    "ModelConfig",
    "TextConfig",
    "TokenIds",
    "VisionConfig",
    "describes_vlm",
    "read_hf_config",
]

# Our fields -> keys of the checkpoint's config.json, in its order.
TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "rms_eps": "rms_norm_eps",
}
VISION_KEYS = (
    *("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size", "patch_size", "spatial_merge_size"),
    *("temporal_patch_size", "in_channels", "num_position_embeddings"),
)
DIT_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "num_kv_heads": "num_key_value_heads",
}
HEAD_SIZES = ("action_length", "action_dim", "state_length", "state_dim")
HEAD_KEYS = (*HEAD_SIZES, "flow_steps", "local_window", "position_offset", "compat_bf16_time", "max_prefix")
ROPE_KEYS = ("rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved")
VISION_ROPE_THETA = 10_000.0
VLM_TYPE = "qwen3_vl"
"""model_type of the VLM, in its own folder's config.json too."""
LISTED = 64
"""Numbers in a list of config.json; the published have 3."""


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. std_epsilon is added to std on decode: 0 as the hub code, 1e-6 as the post-training code.

    normalize_instruction: the task text enters the prompt with a capital and a full stop, as the hub's clients send it
    to XR-0; False: as it is given, as in the post-training code (spec section 4.1), and to XR-1.
    """

    text: TextConfig
    vision: VisionConfig
    head: ActionHeadConfig
    tokens: TokenIds
    std_epsilon: float = 0.0
    normalize_instruction: bool = True
    hf: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = _contradictions(self)
        if problems:
            raise CheckpointError("config.json contradicts itself: " + "; ".join(problems))

    @property
    def first_read_layer(self) -> int:
        """The language layer whose keys and values the DiT's first layer reads; the others follow in order."""
        return self.text.num_layers - self.head.num_layers

    @property
    def family(self) -> str:
        """A key of family.FAMILIES. To be shown, or read its entry there; what differs is in the fields above."""
        return family_of(self.head.stream_norms)

    @property
    def choice_tokens(self) -> dict[int, str]:
        """Id -> token of those that stand in turns of training alone; none where the family has no such turn. They are
        where the family has them, whether the checkpoint's tokenizer names them or not."""
        offsets = CHOICE_OFFSETS if FAMILIES[self.family].choices else {}
        return {self.tokens.image + offset: token for token, offset in offsets.items()}

    @property
    def double_statistics(self) -> bool:
        """Whether action statistics are kept and applied in float64; in float32 else."""
        return FAMILIES[self.family].double_statistics

    @staticmethod
    def load(folder: Path) -> ModelConfig:
        """Read folder/config.json, and where it leaves it to the weights, from their headers which family it is of.

        Raises CheckpointError if it is missing, no JSON, or of another model.
        """
        hf = read_hf_config(folder)
        return ModelConfig.from_hf(hf, stored_shapes(folder) if isinstance(hf, Mapping) and needs_shapes(hf) else {})

    @staticmethod
    def from_hf(hf: Mapping[str, Any], shapes: Shapes = MappingProxyType({})) -> ModelConfig:
        """Read the dictionary that transformers 4 or 5 writes. Raises CheckpointError that names what is missing.

        shapes: of the tensors that stand beside it, if they are at hand.
        """
        if not isinstance(hf, Mapping) or "vlm_config" not in hf or "dit_config" not in hf:
            kind = hf.get("model_type", "unknown") if isinstance(hf, Mapping) else type(hf).__name__
            raise CheckpointError(
                f"config.json describes another model (model_type {kind!r}): XR-0 has `vlm_config` and `dit_config`"
            )
        try:
            return _read(hf, shapes)
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}") from None
        except CheckpointError:
            raise
        except FAULTS as error:
            raise CheckpointError(f"config.json holds a value of the wrong kind: {one_line(error)}") from None

    def to_hf(self) -> dict[str, Any]:
        """The inverse of from_hf; readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
        text, vision, head = self.text, self.vision, self.head
        rope = {"rope_type": "default", "mrope_section": list(text.mrope_section), "mrope_interleaved": True}
        return {
            "model_type": FAMILIES[self.family].model_type,
            "torch_dtype": "bfloat16",
            "vlm_config": {
                "model_type": VLM_TYPE,
                "image_token_id": self.tokens.image,
                **({} if self.tokens.video is None else {"video_token_id": self.tokens.video}),
                "vision_start_token_id": self.tokens.vision_start,
                "vision_end_token_id": self.tokens.vision_end,
                "tie_word_embeddings": True,
                "text_config": {
                    "model_type": "qwen3_vl_text",
                    **{key: getattr(text, name) for name, key in TEXT_KEYS.items()},
                    "hidden_act": "silu",
                    "attention_bias": False,
                    "tie_word_embeddings": True,
                    "rope_theta": text.rope_theta,
                    "rope_scaling": rope,
                    "rope_parameters": {**rope, "rope_theta": text.rope_theta},
                },
                "vision_config": {
                    "model_type": "qwen3_vl_vision",
                    **{name: getattr(vision, name) for name in VISION_KEYS},
                    "deepstack_visual_indexes": list(vision.deepstack_layers),
                    "hidden_act": "gelu_pytorch_tanh",
                },
            },
            "dit_config": {
                **{key: getattr(head, name) for name, key in DIT_KEYS.items()},
                **{name: getattr(head, name) for name, usual in VARIANT.items() if getattr(head, name) != usual},
            },
            **{name: getattr(head, name) for name in HEAD_KEYS},
            "std_epsilon": self.std_epsilon,
            "normalize_instruction": self.normalize_instruction,
        }


def read_hf_config(folder: Path) -> Any:
    """What folder/config.json holds, unchecked. Raises CheckpointError if it is missing or no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: not a checkpoint folder")
    return read_json(path)


def describes_vlm(hf: Any) -> bool:
    """hf: a config.json's content. Whether it is of the VLM alone that the model is made of, without an action head."""
    return isinstance(hf, Mapping) and hf.get("model_type") == VLM_TYPE and "dit_config" not in hf


def _read(hf: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    vlm, text, vision, dit = _parts(hf)
    outer_keys = dict.fromkeys((*HEAD_KEYS, *OFFSETS))
    misplaced = [key for key in outer_keys if dit.get(key) is not None and key not in HEAD_SIZES and key not in hf]
    if misplaced:
        raise CheckpointError(f"config.json: {', '.join(misplaced)} within dit_config: put it beside dit_config")
    told = completed(hf, shapes)
    head = _read_head(told, told["dit_config"])
    for outer in (hf, vlm):
        # transformers reads text_config's alone: a scaling that stands outside of it was meant for it.
        for place in ("rope_scaling", "rope_parameters"):
            _check_rope(place, section(outer, place))
    return ModelConfig(
        text=_read_text(text),
        vision=_read_vision(vision),
        head=head,
        tokens=TokenIds(
            image=whole(vlm, "image_token_id"),
            vision_start=whole(vlm, "vision_start_token_id"),
            vision_end=whole(vlm, "vision_end_token_id"),
            video=_optional(vlm, "video_token_id"),
        ),
        std_epsilon=number(hf, "std_epsilon", 0.0),
        normalize_instruction=flag(
            hf, "normalize_instruction", FAMILIES[family_of(head.stream_norms)].normalize_instruction
        ),
        hf=dict(hf),
    )


def _parts(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """vlm_config, its text_config and vision_config, dit_config. Raises KeyError for one that is missing, TypeError for
    one that is no object."""
    vlm = hf["vlm_config"]
    found = {"vlm_config": vlm, "dit_config": hf["dit_config"]}
    if isinstance(vlm, Mapping):
        found |= {f"vlm_config.{name}": vlm[name] for name in ("text_config", "vision_config")}
    for name, value in found.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is {value!r:.80}, not an object")
    return vlm, vlm["text_config"], vlm["vision_config"], hf["dit_config"]


def _read_text(text: Mapping[str, Any]) -> TextConfig:
    rope = _read_rope(text)
    _insist("text hidden_act", text.get("hidden_act", "silu"), "silu")
    _insist("text attention_bias", text.get("attention_bias", False), False)
    heads = whole(text, "num_attention_heads", least=1)
    given = {"head_dim": whole(text, "hidden_size") // heads, "rms_norm_eps": 1e-6, **text}
    return TextConfig(
        **{name: whole(given, key) for name, key in TEXT_KEYS.items() if name != "rms_eps"},
        rms_eps=number(given, "rms_norm_eps"),
        rope_theta=number(rope, "rope_theta"),
        mrope_section=_whole_numbers(rope, "mrope_section"),  # type: ignore[arg-type]
    )


def _read_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and mrope_section, wherever they stand: transformers 5 moved rope_theta and rope_scaling into one
    dictionary, rope_parameters. Raises CheckpointError for another rotary embedding than XR-0's, under any key."""
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters", "text_config"):
        part = text if place == "text_config" else section(text, place)
        if part is not text:
            _check_rope(place, part)
        for key in ("mrope_section", "rope_theta"):
            if part.get(key) is not None and rope.setdefault(key, part[key]) != part[key]:
                raise CheckpointError(f"config.json: {key} is {part[key]} in {place}, {rope[key]} elsewhere")
    _insist("text partial_rotary_factor", text.get("partial_rotary_factor") or 1, 1)
    missing = [key for key in ("rope_theta", "mrope_section") if key not in rope]
    if missing:
        raise KeyError(f"vlm_config.text_config.{missing[0]}")
    return rope


def _check_rope(place: str, rope: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a scaling, or a layout of frequencies, that XR-0 does not have."""
    kinds = {key: rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    # `type` is the key of transformers before 4.43; `mrope` was Qwen2-VL's word for `default` with three axes.
    strange = {key: kind for key, kind in kinds.items() if kind not in ("default", "mrope")}
    if strange:
        told = ", ".join(f"{key} is {kind!r}" for key, kind in kinds.items())
        raise CheckpointError(f"config.json: {place}: {told}; XR-0 has 'default': its positions are not scaled")
    # Qwen2-VL's sections stand one behind the other; only a file of Qwen3-VL, which has no `type`, may leave it out.
    interleaved = rope.get("mrope_interleaved")
    if interleaved is None and ("type" in kinds or "mrope" in kinds.values()):
        raise CheckpointError(
            f"config.json: {place} has type {kinds.get('type', 'mrope')!r} without mrope_interleaved, as Qwen2-VL, "
            "whose frequencies are in another order; XR-0's files say mrope_interleaved: true"
        )
    _insist(f"{place}: mrope_interleaved", True if interleaved is None else interleaved, True)
    unknown = {key: value for key, value in rope.items() if key not in ROPE_KEYS and value not in (None, 1)}
    if unknown:
        raise CheckpointError(f"config.json: {place} holds {unknown}; XR-0's positions are not scaled")


def _read_vision(vision: Mapping[str, Any]) -> VisionConfig:
    _insist("vision hidden_act", vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type") not in (None, "axial", "default"):
        raise CheckpointError(f"config.json: vision rope_type is {rope['rope_type']!r}; XR-0 has 'axial'")
    _insist("vision rope_theta", rope.get("rope_theta") or VISION_ROPE_THETA, VISION_ROPE_THETA)
    return VisionConfig(
        **{name: whole({"in_channels": 3, **vision}, name) for name in VISION_KEYS},
        deepstack_layers=_whole_numbers(vision, "deepstack_visual_indexes"),
    )


def _whole_numbers(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A list of at most LISTED of them. Raises TypeError for anything else."""
    found = values[name]
    if not isinstance(found, list | tuple) or len(found) > LISTED:
        raise TypeError(f"{name} is {found!r:.80}, not a list of at most {LISTED} whole numbers")
    return tuple(whole({name: item}, name) for item in found)


def _read_head(hf: Mapping[str, Any], dit: Mapping[str, Any]) -> ActionHeadConfig:
    return ActionHeadConfig(
        **{name: whole(dit, key) for name, key in DIT_KEYS.items()},
        **{name: whole(hf, name) for name in HEAD_SIZES},
        flow_steps=whole(hf, "flow_steps", 5),
        local_window=_optional(hf, "local_window"),
        position_offset=whole(hf, "position_offset", 0),
        compat_bf16_time=flag(hf, "compat_bf16_time", False),
        max_prefix=whole(hf, "max_prefix", TRAINED_PREFIX),
        stream_norms=flag(dit, "stream_norms", True),
        mlp_width=_optional(dit, "mlp_width"),
        output_width=_optional(dit, "output_width"),
    )


def _optional(values: Mapping[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else whole(values, name)


def _insist(name: str, value: object, supported: object) -> None:
    if value != supported:
        raise CheckpointError(f"config.json: {name} is {value!r}; XR-0 has {supported!r}")


def _contradictions(config: ModelConfig) -> list[str]:
    text, vision, head = config.text, config.vision, config.head
    strange = [fault for name in ("text", "vision", "head") for fault in out_of_range(name, getattr(config, name))]
    least, most = STD_EPSILON
    if not least <= config.std_epsilon <= most:
        strange.append(f"std_epsilon is {config.std_epsilon}, expected {least} to {most}")
    if strange:
        # The rest divides by them.
        return strange
    checks = [
        (head.head_dim == text.head_dim, f"head_dim is {head.head_dim} in the DiT, {text.head_dim} in the VLM"),
        (
            head.num_kv_heads == text.num_kv_heads,
            f"{head.num_kv_heads} KV heads in the DiT, {text.num_kv_heads} in the VLM",
        ),
        (head.num_layers <= text.num_layers, f"{head.num_layers} DiT layers read {text.num_layers} VLM layers"),
        (head.hidden_size % head.head_dim == 0, f"DiT hidden_size {head.hidden_size} is no multiple of head_dim"),
        (
            head.num_heads % head.num_kv_heads == 0,
            f"{head.num_heads} DiT heads are no multiple of {head.num_kv_heads} KV heads",
        ),
        (text.num_heads % text.num_kv_heads == 0, f"{text.num_heads} text heads, {text.num_kv_heads} KV heads"),
        (
            len(text.mrope_section) == 3 and sum(text.mrope_section) * 2 == text.head_dim,
            f"mrope_section {list(text.mrope_section)} does not sum to half of head_dim {text.head_dim}",
        ),
        (vision.hidden_size % vision.num_heads == 0, "vision hidden_size is no multiple of its num_heads"),
        (vision.out_hidden_size == text.hidden_size, "vision out_hidden_size differs from the text hidden_size"),
        (vision.position_grid**2 == vision.num_position_embeddings, "num_position_embeddings is no square"),
        (
            all(0 <= layer < vision.depth for layer in vision.deepstack_layers)
            and len(vision.deepstack_layers) <= text.num_layers
            and len(set(vision.deepstack_layers)) == len(vision.deepstack_layers),
            f"deepstack_visual_indexes {list(vision.deepstack_layers)} are not some of {vision.depth} blocks once",
        ),
    ]
    return [message for holds, message in checks if not holds]
