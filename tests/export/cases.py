"""The cases that tests export, and a checkpoint of XR-1's that sees videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.exported.manifest import ExportCase
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.limits import VIDEO_FILE, ImageLimits
from xr0_engine.sizes import tiny_xr1_config

LIBERO = ExportCase("libero", "libero_all", (64, 64))
"""Of cameras so small that a view is four tokens."""
VIDEOS = ExportCase("robocasa365", "robocasa365", (64, 64))


def write_video_checkpoint(folder: Path) -> None:
    """Smaller than tiny, in RoboCasa365's mode but for the offset: four states, videos of four frames.

    Pictures would be resized to a quarter of VIDEOS' pixels; videos are not resized.
    """
    config = tiny_xr1_config()
    config = replace(
        config,
        text=replace(config.text, num_layers=2),
        vision=replace(config.vision, depth=2, deepstack_layers=(0,)),
        head=replace(config.head, num_layers=2, flow_steps=2, state_length=4, action_length=16, position_offset=10),
    )
    write_checkpoint(folder, config, limits=ImageLimits(1024, 1024), embodiment=load_embodiment("robocasa365"))
    (folder / VIDEO_FILE).write_text(json.dumps({"do_resize": False}))
