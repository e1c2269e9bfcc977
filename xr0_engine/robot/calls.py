"""A batch of calls in the model's units, and its chunks back in the robots'.

Shape legend: B batch, T actions, A action columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xr0_engine.robot.decode import decode, encode_prefix
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.types import ActionChunk, Observation, TokenizedObservation

Statistics = Mapping[str, ActionStatistics]
"""Of each robot type."""


@dataclass(frozen=True)
class Given:
    """What a batch starts from. observations, prefixes: as callers gave them; noise, prefix: (B, T, A) float32 in the
    model's units, prefix padded; prefix_length: (B,)."""

    observations: Sequence[Observation | TokenizedObservation]
    prefixes: Sequence[np.ndarray | None]
    robot_types: list[str]
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor


def take(
    observations: Sequence[Observation | TokenizedObservation],
    prefixes: Sequence[np.ndarray | None],
    robot_types: list[str],
    noise: np.ndarray | Tensor | None,
    seed: int | Sequence[int | None] | None,
    shape: tuple[int, int, int],
    statistics: Statistics,
) -> Given:
    """shape: (B, T, A); all else as Engine.infer. Raises ValueError for what is wrong in prefixes, noise or seed."""
    start, (batch, length, width) = start_noise(noise, seed, shape), shape
    padded = torch.zeros(shape, dtype=torch.float32, device="cpu")
    lengths = torch.zeros(batch, dtype=torch.long, device="cpu")
    for row, (prefix, robot_type) in enumerate(zip(prefixes, robot_types, strict=True)):
        if prefix is None:
            continue
        prefix = np.asarray(prefix)
        if prefix.ndim != 2 or prefix.shape[1] != width or len(prefix) > length:
            raise ValueError(f"prefix: expected (at most {length}, {width}), got {prefix.shape}")
        prefix = checked("prefix", prefix, prefix.shape).numpy()
        with np.errstate(over="ignore"):
            normalized = encode_prefix(prefix, statistics[robot_type])
        if not np.isfinite(normalized).all():
            raise ValueError(
                f"prefix: expected actions that {robot_type!r} can have; divided by its std they are infinite"
            )
        padded[row, : len(prefix)] = torch.from_numpy(normalized)
        lengths[row] = len(prefix)
    return Given(observations, prefixes, robot_types, start, padded, lengths)


def chunks(
    sampled: np.ndarray, given: Given, statistics: Statistics, plausible_std: float | None = None
) -> list[ActionChunk]:
    """sampled: (B, T, A) float32, in the model's units, kept. Each row's prefix comes back unchanged.

    plausible_std: how many std from the mean an action may be, None: any. Raises RuntimeError for actions that are not
    finite, in the model's units or in the robot's, or not plausible.
    """
    if not np.isfinite(sampled).all():
        raise RuntimeError(
            "the model gave actions that are not finite: the checkpoint is broken, or float16 overflowed"
        )
    found = []
    for normalized, observation, prefix, robot_type, length in zip(
        sampled, given.observations, given.prefixes, given.robot_types, given.prefix_length, strict=True
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            actions = decode(normalized, statistics[robot_type])
        _check_actions(actions, statistics[robot_type], robot_type, int(length), plausible_std)
        if prefix is not None:
            actions[: len(prefix)] = prefix
        found.append(
            ActionChunk(
                actions=actions,
                normalized=normalized,
                active_columns=statistics[robot_type].action_mask.max(0) > 0,
                robot_type=robot_type,
                prefix_length=int(length),
                timestamp_s=observation.timestamp_s,
            )
        )
    return found


def _check_actions(
    actions: np.ndarray, statistics: ActionStatistics, robot_type: str, prefix_length: int, plausible_std: float | None
) -> None:
    """actions: (T, A), robot units; those of the prefix were the caller's. Raises RuntimeError."""
    if not np.isfinite(actions).all():
        raise RuntimeError(
            f"actions that are not finite in the units of {robot_type!r}: its statistics are too large for float32"
        )
    if plausible_std is None:
        return
    far = statistics.unreasonable(actions, plausible_std, start=prefix_length)
    if far:
        raise RuntimeError(
            f"actions of {robot_type!r} more than {plausible_std:g} std from the mean in columns {far}: not executed; "
            "the observation, the robot type or the checkpoint is another than it should be, or plausible_std too small"
        )


def start_noise(
    noise: np.ndarray | Tensor | None, seed: int | Sequence[int | None] | None, shape: tuple[int, ...]
) -> Tensor:
    """float32 noise (batch, T, A): as given ((T, A) for a batch of one), from seed + row or a row's own, or fresh."""
    if noise is not None:
        if seed is not None:
            raise ValueError("noise, seed: expected at most one of them, got both")
        if shape[0] == 1 and np.ndim(noise) == 2:
            return checked("noise", noise, shape[1:])[None]
        return checked("noise", noise, shape)
    if seed is None:
        return torch.randn(shape, dtype=torch.float32, device="cpu")
    if isinstance(seed, list | tuple):
        if len(seed) != shape[0]:
            raise ValueError(f"seed: expected one per observation ({shape[0]}), got {len(seed)}")
        return torch.cat([start_noise(None, own, (1, *shape[1:])) for own in seed])
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63 - shape[0]:
        raise ValueError(f"seed: expected a whole number from 0 below 2**63, got {seed!r}")
    generators = [torch.Generator("cpu").manual_seed(int(seed) + row) for row in range(shape[0])]
    return torch.stack(
        [torch.randn(shape[1:], generator=each, dtype=torch.float32, device="cpu") for each in generators]
    )


def checked(name: str, value: np.ndarray | Tensor, shape: tuple[int, ...]) -> Tensor:
    """The value as float32 on the host, wherever it was."""
    array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected numbers, got dtype {array.dtype}")
    tensor = torch.as_tensor(array, dtype=torch.float32, device="cpu")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or inf")
    return tensor
