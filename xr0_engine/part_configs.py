"""What the network's parts are, as data; config.py reads and writes them, and is where to import them from."""

from __future__ import annotations

from dataclasses import dataclass

TRAINED_PREFIX = 6
"""Longest prefix of the published training (spec section 4.1); released checkpoints do not state it."""

Range = tuple[float, float]
"""Least and most."""

LAYERS: Range = (1, 128)
"""Three times the published language model's."""
WIDTH: Range = (1, 1 << 16)
"""Of tokens; 25 times the published language model's."""
MLP_WIDTH: Range = (1, 1 << 18)
HEADS: Range = (1, 1 << 10)
HEAD_DIM: Range = (2, 1 << 10)
STEPS: Range = (1, 1 << 10)
"""Actions in a chunk: half a minute at 30 Hz. The published have 30 at most."""
COLUMNS: Range = (1, 1 << 10)
"""Of actions and states; the published have 32."""
POSITIONS: Range = (0, 1 << 20)
"""What float32 holds exactly, and rotary tables still tell from the next."""

RANGES: dict[str, dict[str, Range]] = {
    "text": {
        "vocab_size": (1, 1 << 22),
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP_WIDTH,
        "rms_eps": (1e-12, 1e-1),
        "rope_theta": (1.0, 1e12),
    },
    "vision": {
        "depth": LAYERS,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": MLP_WIDTH,
        "out_hidden_size": WIDTH,
        "patch_size": (1, 256),
        "spatial_merge_size": (1, 16),
        "temporal_patch_size": (1, 16),
        "in_channels": (1, 16),
        "num_position_embeddings": (1, 1 << 20),
    },
    "head": {
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "head_dim": HEAD_DIM,
        "num_kv_heads": HEADS,
        "state_length": STEPS,
        "state_dim": COLUMNS,
        "action_length": STEPS,
        "action_dim": COLUMNS,
        # A table of modulations is kept for each: 100 MB for the published sizes. The published take 5.
        "flow_steps": (1, 256),
        "local_window": POSITIONS,
        "position_offset": POSITIONS,
        "max_prefix": (0, STEPS[1]),
        "mlp_width": MLP_WIDTH,
        "output_width": WIDTH,
    },
}
"""Part of a model -> field -> what it may be. None of it is near what is published; beyond, a file is no model's, and
what would be made of it takes more memory or time than there is."""

STD_EPSILON: Range = (0.0, 1e-2)
"""Of robot units: the published code has 0 or 1e-6."""


@dataclass(frozen=True)
class VisionConfig:
    """Qwen3-VL vision tower. deepstack_layers: blocks whose output is tapped."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    in_channels: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Columns of a patch: its temporal_patch_size frames, by channel."""
        return self.temporal_patch_size * self.frame_dim

    @property
    def frame_dim(self) -> int:
        """Columns of a patch of one frame."""
        return self.in_channels * self.patch_size**2

    def frames_of(self, columns: int) -> int:
        """How many frames patches of so many columns hold: one, which fills the temporal patch, or all of them.

        Raises ValueError for any other number of columns.
        """
        if columns not in (self.frame_dim, self.patch_dim):
            raise ValueError(
                f"pixel_values: expected {self.patch_dim} columns (a patch's {self.temporal_patch_size} frames) or "
                f"{self.frame_dim} (one frame, shown for all of them), got {columns}"
            )
        return columns // self.frame_dim

    @property
    def position_grid(self) -> int:
        """Side of the square grid of learned position embeddings."""
        return round(self.num_position_embeddings**0.5)


@dataclass(frozen=True)
class TextConfig:
    """Qwen3-VL language model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class ActionHeadConfig:
    """DiT action head.

    local_window: how many actions back an action sees (None = all); position_offset: added to the positions of actions
    that are not prefix. None and 0 are the released benchmark checkpoints' mode, 4 and 10 the post-training code's
    (spec section 2.4). compat_bf16_time: round 1000 t, and the rotary tables of the whole model, to bfloat16 as the
    released server does, which casts everything to it.
    max_prefix: the longest prefix that it was trained with; what a longer one gives was never learned.

    What differs between families of action heads besides sizes. stream_norms: the residual stream itself is normalised
    after attention and MLP (2.2), or never. mlp_width: None is four times hidden_size. output_width: between the two
    products of the output layer; None is action_dim. The defaults are XR-0's.
    """

    hidden_size: int
    num_layers: int
    head_dim: int
    num_kv_heads: int
    state_length: int
    state_dim: int
    action_length: int
    action_dim: int
    flow_steps: int = 5
    local_window: int | None = None
    position_offset: int = 0
    compat_bf16_time: bool = False
    max_prefix: int = TRAINED_PREFIX
    stream_norms: bool = True
    mlp_width: int | None = None
    output_width: int | None = None

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def intermediate_size(self) -> int:
        """Columns between the MLP's products."""
        return 4 * self.hidden_size if self.mlp_width is None else self.mlp_width

    @property
    def output_hidden_size(self) -> int:
        """Columns between the output layer's products."""
        return self.action_dim if self.output_width is None else self.output_width

    @property
    def context(self) -> int:
        """Tokens before the actions: the sink and the states."""
        return 1 + self.state_length


@dataclass(frozen=True)
class TokenIds:
    """Special tokens that the engine itself looks for. video: stands in prompts where a video's tokens go, which are
    computed as those of images; None: config.json names no such token."""

    image: int
    vision_start: int
    vision_end: int
    video: int | None = None


def out_of_range(part: str, config: VisionConfig | TextConfig | ActionHeadConfig) -> list[str]:
    """The fields of a part of a model (a key of RANGES) that are not what they may be, each in words."""
    return [
        f"{part}.{name} is {value}, expected {least} to {most}"
        for name, (least, most) in RANGES[part].items()
        if (value := getattr(config, name)) is not None and not least <= value <= most
    ]


def least_parameters(text: TextConfig, vision: VisionConfig, head: ActionHeadConfig | None = None) -> int:
    """How many numbers the products and tables of a model have, for which no module has to be made; what is small
    beside them (norms, biases) is left out. head: None is the VLM alone."""
    attention = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    found = text.vocab_size * text.hidden_size
    found += text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)
    found += vision.hidden_size * (vision.patch_dim + vision.num_position_embeddings)
    found += vision.depth * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    if head is not None:
        found += head.num_layers * 2 * head.hidden_size * (head.hidden_size + head.intermediate_size)
    return found
