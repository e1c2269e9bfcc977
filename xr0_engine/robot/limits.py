"""What preprocessor_config.json says of images: limits that are honoured, and values that only the released may have.

Nothing else of the released image processor (spec section 3.1) is a matter of configuration here: a file that asks for
another normalisation, resampling or patch size is refused. Absent keys mean the released values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xr0_engine.config import VisionConfig
from xr0_engine.files import PROCESSOR_FILE, find_settings, is_number, read_json
from xr0_engine.types import CheckpointError

BICUBIC = 3
"""Pillow's number for it, and transformers'."""
LARGEST_MINIMUM = 2**20
"""Pixels that a smaller picture may be enlarged to: sixteen times what Qwen3-VL's own processor has, a thousand image
tokens."""
LARGEST_MAXIMUM = 2**26
"""Four times the pixels that the largest picture of Qwen3-VL's own processor may have."""


@dataclass(frozen=True)
class ImageLimits:
    """Pixels of a resized image, at least and at most; resize False: images come in a size that the model takes, within
    max_pixels. Raises ValueError for limits that make no sense."""

    min_pixels: int
    max_pixels: int
    resize: bool = True

    def __post_init__(self) -> None:
        most = min(self.max_pixels, LARGEST_MINIMUM)
        if not (1 <= self.min_pixels <= most and self.max_pixels <= LARGEST_MAXIMUM):
            raise ValueError(
                f"image limits: expected 1 <= min_pixels <= max_pixels, min_pixels <= {LARGEST_MINIMUM}, and "
                f"max_pixels <= {LARGEST_MAXIMUM}, got {self.min_pixels} and {self.max_pixels}"
            )

    def to_hf(self) -> dict[str, Any]:
        """Under the keys of transformers 4.57 and of those after it."""
        return {
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **({} if self.resize else {"do_resize": False}),
        }


RELEASED_LIMITS = ImageLimits(1024, 90_000)

POST_TRAINING_LIMITS = ImageLimits(3136, 160_000)
"""Of XR-1's post-training code and its clients (spec section 8); none of its processor files says so."""

VIDEO_FILE = "video_preprocessor_config.json"
LARGEST_UNRESIZED = 1 << 20
"""Pixels of an image that is taken as it is: sixteen times what the released model has seen of videos."""


def load_limits(folder: Path, vision: VisionConfig) -> ImageLimits:
    """The limits of a checkpoint folder; the released ones if it has no preprocessor_config.json.

    Raises CheckpointError that names every key that contradicts another, makes no sense, or asks for what the engine
    does not do, and for a processor_config.json that says something else.
    """
    told = {path: read_limits(path, raw, vision) for path, raw in find_settings(folder).items()}
    if len(set(told.values())) > 1:
        raise CheckpointError(
            " and ".join(f"{path} has {one.min_pixels} to {one.max_pixels} pixels" for path, one in told.items())
            + ": give both the limits of the training"
        )
    return next(iter(told.values()), RELEASED_LIMITS)


def load_video_limits(folder: Path, vision: VisionConfig) -> ImageLimits:
    """The limits of a checkpoint's videos; where no file says anything of videos, those of images.

    Raises CheckpointError as load_limits does, and for a file whose videos are resized: what transformers does then
    goes by all frames together, which no released XR-1 does (spec section 8).
    """
    told = find_video_settings(folder)
    if told is None:
        return load_limits(folder, vision)
    path, raw = told
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    faults = _unsupported({**raw, "do_resize": None}, vision)
    if raw.get("do_resize", True) is not False:
        faults.append("do_resize is not false: the engine takes videos in the size that they come in")
    if faults:
        raise CheckpointError(
            f"{path}: {'; '.join(faults)}. Correct the file if the model was trained with what the engine does, or "
            "choose an embodiment profile without a history"
        )
    return ImageLimits(1, LARGEST_UNRESIZED, resize=False)


def find_video_settings(folder: Path) -> tuple[Path, Any] | None:
    """The file of a checkpoint folder that says how videos are prepared, and what it says; None if none does."""
    path = folder / VIDEO_FILE
    if path.is_file():
        return path, read_json(path)
    path = folder / PROCESSOR_FILE
    content = read_json(path) if path.is_file() else None
    raw = content.get("video_processor") if isinstance(content, Mapping) else None
    return None if raw is None else (path, raw)


def read_limits(path: Path, raw: Any, vision: VisionConfig) -> ImageLimits:
    """As load_limits; raw: what the file `path` holds."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    faults = _unsupported(raw, vision)
    limits = RELEASED_LIMITS
    try:
        limits = _limits(raw) if raw.get("do_resize") is not False else ImageLimits(1, LARGEST_UNRESIZED, resize=False)
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        if limits.max_pixels < token:
            raise ValueError(f"max_pixels is {limits.max_pixels}, less than the {token} pixels of one image token")
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise CheckpointError(
            f"{path}: {'; '.join(faults)}. Correct the file if the model was trained with what the engine does"
        )
    return limits


def _limits(raw: Mapping[str, Any]) -> ImageLimits:
    size = raw.get("size")
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
    if size is None or (_has(raw, "min_pixels") and _has(raw, "max_pixels")):
        # Every version of transformers reads both of these instead of `size`, whatever that says.
        size = {}
    elif not isinstance(size, Mapping) or size.keys() != {"shortest_edge", "longest_edge"}:
        raise ValueError(f"size is {size!r:.80}: expected the pixels as {{shortest_edge, longest_edge}}")
    chosen = {}
    for key, older in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        given = {name: _pixels(name, place[name]) for place, name in ((size, key), (raw, older)) if _has(place, name)}
        if len(set(given.values())) > 1:
            raise ValueError(f"size.{key} is {given[key]}, {older} is {given[older]}: keep the one of the training")
        chosen[older] = next(iter(given.values()), getattr(RELEASED_LIMITS, older))
    return ImageLimits(chosen["min_pixels"], chosen["max_pixels"])


def _has(place: Mapping[str, Any], name: str) -> bool:
    return place.get(name) is not None


def _pixels(name: str, value: Any) -> int:
    if not is_number(value) or value != value // 1:
        raise ValueError(f"{name} is {value!r:.40}: expected a whole number of pixels")
    return int(value)


def _unsupported(raw: Mapping[str, Any], vision: VisionConfig) -> list[str]:
    """What the file asks for, and the engine does not do."""
    supported: dict[str, object] = {
        "do_rescale": True,
        "do_normalize": True,
        "do_center_crop": False,
        "do_pad": False,
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    resize = raw.get("do_resize")
    strange = [] if resize is None or isinstance(resize, bool) else [f"do_resize is {resize!r:.80}, not true or false"]
    return strange + [
        f"{key} is {raw[key]!r:.80}, the engine has {expected!r} alone"
        for key, expected in supported.items()
        if _has(raw, key) and not _equal(raw[key], expected)
    ]


def _equal(value: Any, expected: object) -> bool:
    if isinstance(expected, float):
        # The factor is written with more or fewer digits.
        return isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-6)
    if isinstance(expected, bool):
        return value is expected
    return type(value) is not bool and value == expected
