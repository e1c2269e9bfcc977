"""A batch of calls in the model's units, and its chunks back in the robots'.

Shape legend: B batch, T actions, A action columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from xr0_engine.robot.decode import decode, encode_prefix
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.types import ActionChunk, Guide, Observation, TokenizedObservation

Statistics = Mapping[str, ActionStatistics]
"""Of each robot type."""

FAILURES = (ValueError, RuntimeError, MemoryError)
"""What a call may raise after which the engine serves the next."""
Argument = TypeVar("Argument")
Result = TypeVar("Result")


def attempt(work: Callable[[Argument], Result], argument: Argument) -> Result | Exception:
    """What came of it, or what it raised."""
    try:
        return work(argument)
    except FAILURES as error:
        return error


@dataclass(frozen=True)
class Guides:
    """What the rows of a batch are drawn toward. target: (B, T, A) float32, the model's units, padded; length, frozen:
    (B,), how many actions of it there are and are frozen, 0 in rows without a guide."""

    target: Tensor
    length: Tensor
    frozen: Tensor


@dataclass(frozen=True)
class Asked:
    """A batch as its caller gave it, one prefix or None and one guide or None for each observation. noise, seed: as in
    Engine.infer."""

    observations: Sequence[Observation | TokenizedObservation]
    prefixes: Sequence[np.ndarray | None]
    noise: np.ndarray | None
    seed: int | Sequence[int | None] | None
    guides: Sequence[Guide | None]

    @classmethod
    def batch(
        cls,
        observations: Sequence[Observation],
        prefix: Sequence[np.ndarray | None] | None,
        noise: np.ndarray | None,
        seed: int | Sequence[int | None] | None,
        guide: Sequence[Guide | None] | None,
    ) -> Asked:
        """Raises ValueError for another number of prefixes or guides than of observations."""
        none = [None] * len(observations)
        asked = cls(observations, none if prefix is None else prefix, noise, seed, none if guide is None else guide)
        for name, given in (("prefix", asked.prefixes), ("guide", asked.guides)):
            if len(given) != len(observations):
                raise ValueError(f"{name}: expected one per observation ({len(observations)}), got {len(given)}")
        return asked


@dataclass(frozen=True)
class Given:
    """What a batch starts from. asked: as its caller gave it; noise, prefix: (B, T, A) float32 in the model's units,
    prefix padded; prefix_length: (B,); guides: None if no row has one."""

    asked: Asked
    robot_types: list[str]
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor
    guides: Guides | None = None


def take(asked: Asked, robot_types: list[str], shape: tuple[int, ...], statistics: Statistics) -> Given:
    """shape: (B, T, A). Raises ValueError for what is wrong in prefixes, noise, seed or guides."""
    start = start_noise(asked.noise, asked.seed, shape)
    padded, lengths = _padded("prefix", asked.prefixes, robot_types, shape, statistics)
    given = Given(asked, robot_types, start, padded, lengths)
    guides = asked.guides
    if all(guide is None for guide in guides):
        return given
    for prefix, guide in zip(asked.prefixes, guides, strict=True):
        if prefix is not None and guide is not None:
            raise ValueError("prefix, guide: expected at most one of them, got both")
        if guide is not None:
            check_guide(guide)
    actions = [None if guide is None else guide.actions for guide in guides]
    target, length = _padded("guide", actions, robot_types, shape, statistics)
    frozen = [0 if guide is None else guide.frozen for guide in guides]
    return replace(given, guides=Guides(target, length, torch.tensor(frozen, device="cpu")))


def check_guide(guide: Guide) -> None:
    """Raises ValueError for what is no Guide, or freezes more actions than it has. Its actions are not looked into."""
    if not isinstance(guide, Guide):
        raise ValueError(f"guide: expected a Guide, got {type(guide).__name__}")
    frozen, most = guide.frozen, len(guide.actions)
    if isinstance(frozen, bool) or not isinstance(frozen, int | np.integer) or not 0 <= frozen <= most:
        raise ValueError(f"guide, frozen: expected how many of its {most} actions are executed, got {frozen!r:.80}")


def _padded(
    name: str,
    rows: Sequence[np.ndarray | None],
    robot_types: list[str],
    shape: tuple[int, ...],
    statistics: Statistics,
) -> tuple[Tensor, Tensor]:
    """The first actions of chunks in the model's units, (B, T, A) float32, and how many there are, (B,)."""
    batch, length, width = shape
    padded = torch.zeros(shape, dtype=torch.float32, device="cpu")
    lengths = torch.zeros(batch, dtype=torch.long, device="cpu")
    for row, (actions, robot_type) in enumerate(zip(rows, robot_types, strict=True)):
        if actions is None:
            continue
        actions = np.asarray(actions)
        if actions.ndim != 2 or actions.shape[1] != width or len(actions) > length:
            raise ValueError(f"{name}: expected (at most {length}, {width}), got {actions.shape}")
        actions = checked(name, actions, actions.shape).numpy()
        with np.errstate(over="ignore"):
            normalized = encode_prefix(actions, statistics[robot_type])
        if not np.isfinite(normalized).all():
            raise ValueError(
                f"{name}: expected actions that {robot_type!r} can have; divided by its std they are infinite"
            )
        padded[row, : len(actions)] = torch.from_numpy(normalized)
        lengths[row] = len(actions)
    return padded, lengths


def given_prefix(prefix: np.ndarray | Tensor | None, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A prefix in the model's units, (B, P, A), padded to (B, T, A), and its lengths (B,). shape: (B, T, A). Raises
    ValueError for another shape or values that are not finite."""
    batch, length, width = shape
    given = (batch, 0, width) if prefix is None else np.shape(prefix)
    if len(given) != 3 or given[1] > length:
        raise ValueError(f"prefix: expected (batch {batch}, at most {length}, {width}), got {tuple(given)}")
    padded = torch.zeros(shape, dtype=torch.float32, device="cpu")
    if prefix is not None:
        padded[:, : given[1]] = checked("prefix", prefix, (batch, given[1], width))
    return padded, torch.full((batch,), given[1], dtype=torch.long, device="cpu")


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
        sampled, given.asked.observations, given.asked.prefixes, given.robot_types, given.prefix_length, strict=True
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
