"""Which sample comes when: datasets in turns by weight, each in a random order, every draw a function of its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from xr0_engine.training.data.samples import DataError, LanguageSample, RobotSample, UnfitError

# Length of the cycle in which datasets take turns: the finest weight is one in so many samples.
CYCLE = 4096
# After so many broken samples in a row the data are at fault, not a sample.
MAX_REPLACEMENTS = 100

# What the random numbers of a sample are for; they must not be the same ones.
_ORDER, _TURNS, _CONTENT, _REPLACEMENT = range(4)


class Samples(Protocol):
    """A dataset as the stream sees it."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator | None = None) -> RobotSample | LanguageSample: ...


class Interleaved:
    """Datasets that take turns by weight, each in a new random order every epoch. Draw number -> sample."""

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float], names: Sequence[str], seed: int) -> None:
        for name, dataset in zip(names, datasets, strict=True):
            if not len(dataset):
                raise DataError(f"{name}: nothing to train on: no episode is left that is not invalid or held out")
        self.datasets = tuple(datasets)
        self.seed = seed
        turns = np.repeat(np.arange(len(datasets)), _shares(weights, names))
        self._turns = np.random.default_rng((seed, _TURNS)).permutation(turns)
        # How often a dataset had its turn before each place of the cycle, and in a whole cycle.
        its_turn = self._turns[:, None] == np.arange(len(datasets))
        self._before = np.cumsum(its_turn, axis=0) - its_turn
        self._per_cycle = its_turn.sum(axis=0)

    def sample(self, draw: int, augment: bool, skip_broken: bool) -> tuple[Any, int]:
        """The sample, and how many broken ones it stands in for. Raises DataError."""
        cycle, place = divmod(draw, CYCLE)
        which = int(self._turns[place])
        dataset = self.datasets[which]
        turn = cycle * int(self._per_cycle[which]) + int(self._before[place, which])
        epoch, position = divmod(turn, len(dataset))
        index = shuffled(position, len(dataset), (self.seed, _ORDER, which, epoch))
        for broken in range(MAX_REPLACEMENTS):
            rng = np.random.default_rng((self.seed, _CONTENT, draw)) if augment else None
            try:
                return dataset.sample(index, rng), broken
            except DataError as error:
                if not skip_broken or isinstance(error, UnfitError):
                    raise
            replacement = np.random.default_rng((self.seed, _REPLACEMENT, draw, broken))
            index = int(replacement.integers(len(dataset)))
        raise DataError(f"{MAX_REPLACEMENTS} samples in a row cannot be read: run xr0 data check")


def shuffled(position: int, size: int, key: tuple[int, ...]) -> int:
    """Where a position goes in a random order of 0 .. size - 1 that the key picks: a permutation without a table.

    A Feistel network over the next power of four, walked until it lands below size (at most four steps on average).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    rounds = [int(word) for word in np.random.SeedSequence(key).generate_state(4, np.uint64)]
    while True:
        left, right = position >> half, position & low
        for word in rounds:
            left, right = right, left ^ (_mixed(right ^ word) & low)
        position = (left << half) | right
        if position < size:
            return position


def _mixed(value: int) -> int:
    """A 64-bit hash (the finalizer of SplitMix64)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _shares(weights: Sequence[float], names: Sequence[str]) -> np.ndarray:
    """Turns of each dataset in a cycle: the weights, rounded so that they add up."""
    exact = np.array(weights) / sum(weights) * CYCLE
    shares = np.floor(exact).astype(int)
    largest_remainders = np.argsort(shares - exact, kind="stable")
    shares[largest_remainders[: CYCLE - shares.sum()]] += 1
    for name, share in zip(names, shares, strict=True):
        if not share:
            raise ValueError(f"{name}: its weight is under one in {CYCLE} of the mixture")
    return shares
