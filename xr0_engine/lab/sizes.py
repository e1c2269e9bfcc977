"""The lab's models: small ones of every part of the published, at depths around the length of a chunk."""

from __future__ import annotations

from pathlib import Path

from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.config import ActionHeadConfig, ModelConfig, TextConfig, VisionConfig
from xr0_engine.lab.robots import profile
from xr0_engine.lab.tasks import CHUNK, PointTask
from xr0_engine.robot.prompt import normalize_instruction
from xr0_engine.sizes import tiny_config

WIDTHS = {2: 128, 4: 96, 8: 64, 16: 64}
"""DiT layers -> width, so that deep models are not much larger, nor slower to train, than others."""
HEAD_DIM = 32


def lab_config(depth: int = 4) -> ModelConfig:
    """A model for pictures of 64 pixels a side, with a DiT of so many layers. Raises ValueError for other depths.

    The DiT reads as many layers of the language model, which has them at the least.
    """
    if depth not in WIDTHS:
        raise ValueError(f"depth: expected one of {', '.join(map(str, WIDTHS))}, got {depth}")
    width = WIDTHS[depth]
    return ModelConfig(
        text=TextConfig(1024, width, max(depth, 4), 4, 1, HEAD_DIM, 2 * width, 1e-6, 5_000_000.0, (6, 5, 5)),
        vision=VisionConfig(2, 64, 2, 256, width, 16, 2, 2, 3, 16, (0, 1)),
        head=ActionHeadConfig(width, depth, HEAD_DIM, 1, 1, 32, CHUNK, 32),
        tokens=tiny_config().tokens,
    )


def write_base(folder: Path, task: PointTask, depth: int = 4, seed: int = 0) -> None:
    """The random checkpoint that a policy of a task starts from; the folder must be absent or empty.

    Its tokenizer has the whole prompt of the lab's tasks as a few tokens: in words they are ten times the picture's.
    """
    asked = normalize_instruction(task.instruction)
    write_checkpoint(folder, lab_config(depth), seed, embodiment=profile(task.robot_type), task=asked)
