"""What random checkpoints are made of: sizes, the published ones among them, special tokens, robots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from xr0_engine.config import ActionHeadConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from xr0_engine.family import CHOICE_OFFSETS, FAMILIES

SPECIAL_TOKENS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 9,
    "<|vision_end|>": 10,
    "<|image_pad|>": 12,
    "<|video_pad|>": 13,
}
"""Offsets from the first special id, which is 151643 in Qwen's vocabulary."""
CHOICE_TOKENS = {token: SPECIAL_TOKENS["<|image_pad|>"] + offset for token, offset in CHOICE_OFFSETS.items()}
"""The same, of a family whose language model proposes chunks."""
SPECIAL_ROOM = {"xr0": 32, "xr1": 96}
"""Tokens at the end of a random checkpoint's vocabulary for special ones."""
QWEN_FIRST_SPECIAL = 151643
VOCABULARY = 1024
"""Of the small sizes."""

QWEN_TEXT = TextConfig(151936, 2560, 36, 32, 8, 128, 9728, 1e-6, 5_000_000.0, (24, 20, 20))
QWEN_VISION = VisionConfig(24, 1024, 16, 4096, 2560, 16, 2, 2, 3, 2304, (5, 11, 17))
"""Qwen3-VL-4B-Instruct, the language model of both families (spec section 1)."""
TINY_TEXT = TextConfig(VOCABULARY, 128, 4, 8, 4, 32, 384, 1e-6, 5_000_000.0, (6, 5, 5))
TINY_VISION = VisionConfig(4, 64, 2, 256, 128, 16, 2, 2, 3, 144, (0, 1, 2))


def published_config() -> ModelConfig:
    """Xiaomi-Robotics-0's sizes (spec section 1)."""
    return ModelConfig(
        text=QWEN_TEXT,
        vision=QWEN_VISION,
        head=ActionHeadConfig(1024, 16, 128, 8, 1, 32, 30, 32),
        tokens=token_ids(QWEN_FIRST_SPECIAL),
    )


def small_config() -> ModelConfig:
    """A thirtieth of the published size, for measurements on a CPU."""
    return ModelConfig(
        text=TextConfig(VOCABULARY, 640, 18, 8, 4, 64, 2432, 1e-6, 5_000_000.0, (12, 10, 10)),
        vision=VisionConfig(12, 320, 5, 1280, 640, 16, 2, 2, 3, 2304, (3, 6, 9)),
        head=ActionHeadConfig(256, 8, 64, 4, 1, 32, 30, 32),
        tokens=token_ids(VOCABULARY - SPECIAL_ROOM["xr0"]),
    )


def tiny_config() -> ModelConfig:
    """A model of a few megabytes with every feature of the published one, for tests and the demo."""
    return ModelConfig(
        text=TINY_TEXT,
        vision=TINY_VISION,
        head=ActionHeadConfig(128, 3, 32, 4, 1, 32, 30, 32),
        tokens=token_ids(VOCABULARY - SPECIAL_ROOM["xr0"]),
    )


def published_xr1_config() -> ModelConfig:
    """Xiaomi-Robotics-1's sizes, those that are released (docs/spec.md, Xiaomi-Robotics-1)."""
    return _xr1(QWEN_TEXT, QWEN_VISION, 1024, QWEN_FIRST_SPECIAL)


def tiny_xr1_config() -> ModelConfig:
    """As tiny_config, of the other family: a DiT layer for each language layer."""
    return _xr1(TINY_TEXT, TINY_VISION, 128, VOCABULARY - SPECIAL_ROOM["xr1"])


def _xr1(text: TextConfig, vision: VisionConfig, width: int, first_special: int) -> ModelConfig:
    layers, head_dim, groups = text.num_layers, text.head_dim, text.num_kv_heads
    head = ActionHeadConfig(width, layers, head_dim, groups, 1, 60, 30, 60, stream_norms=False, output_width=width)
    return ModelConfig(
        text, vision, head, token_ids(first_special),
        normalize_instruction=FAMILIES["xr1"].normalize_instruction,
    )  # fmt: skip


Makers = Mapping[str, Callable[[], ModelConfig]]

SIZES: Makers = {"tiny": tiny_config, "small": small_config, "4b": published_config}
"""Of Xiaomi-Robotics-0."""
FAMILY_SIZES: Mapping[str, Makers] = {
    "xr0": SIZES,
    "xr1": {"tiny": tiny_xr1_config, "5b": published_xr1_config},
}

PUBLISHED = "published"
"""A size's name for whichever the family was published in, 4b or 5b."""


def size_of(family: str, size: str) -> str:
    """The size itself; for PUBLISHED the family's own name of it, its largest."""
    return list(FAMILY_SIZES[family])[-1] if size == PUBLISHED else size


Robots = Mapping[str, tuple[int, Iterable[int]]]
"""Robot type -> chunk length and active columns."""

ROBOTS: Robots = {
    "libero_all": (10, range(7)),
    "calvin_abc_orig": (10, range(7)),
    "calvin_abcd_orig": (10, range(7)),
    "bridge_delta": (4, range(7)),
    "fractal_delta": (4, range(7)),
    "bimanual": (30, [*range(13), *range(14, 27)]),
}
FAMILY_ROBOTS: Mapping[str, Robots] = {
    "xr0": ROBOTS,
    "xr1": {
        "mobile": (30, [*range(7), *range(8, 15), 16, *range(17, 20)]),
        "robocasa_mg": (10, range(7)),
        "vlabench_choice": (10, range(7)),
        "robodojo": (10, [*range(6), 7, *range(8, 14), 15]),
    },
}
"""Those that give one state at a time."""


def config_of(family: str, size: str) -> ModelConfig:
    """Raises ValueError for a family or size that there is not."""
    if family not in FAMILY_SIZES:
        raise ValueError(f"family: expected {' or '.join(FAMILY_SIZES)}; got {family!r}")
    if size not in FAMILY_SIZES[family]:
        raise ValueError(f"size: expected {', '.join(FAMILY_SIZES[family])}; got {size!r}")
    return FAMILY_SIZES[family][size]()


def special_tokens(family: str) -> dict[str, int]:
    """Of a family's tokenizer: their offsets from the first."""
    return {**SPECIAL_TOKENS, **(CHOICE_TOKENS if FAMILIES[family].choices else {})}


def token_ids(first: int) -> TokenIds:
    """first: the id of the first special token."""
    return TokenIds(
        image=first + SPECIAL_TOKENS["<|image_pad|>"],
        vision_start=first + SPECIAL_TOKENS["<|vision_start|>"],
        vision_end=first + SPECIAL_TOKENS["<|vision_end|>"],
        video=first + SPECIAL_TOKENS["<|video_pad|>"],
    )


def first_special(tokens: TokenIds) -> int:
    """The inverse of token_ids."""
    return tokens.image - SPECIAL_TOKENS["<|image_pad|>"]
