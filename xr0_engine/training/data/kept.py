"""The episodes that a process keeps in memory: reading one anew costs as much as half of a window."""

from __future__ import annotations

import threading
from collections import OrderedDict

from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.sources import EpisodeFolder, Source, checked_instructions

KEPT_TICKS = 100_000
"""Of episodes from files, whose frames stay there: of two arms 600 bytes a tick."""
KEPT_EPISODES = 256
"""Of a function's, which may hold their pictures."""


class Kept:
    """The episodes that were asked for last; the last one of any length. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._episodes: OrderedDict[tuple[Source, int], Episode] = OrderedDict()
        self._ticks = 0

    def get(self, source: Source, number: int) -> Episode:
        """source.load. Raises DataError, for an instruction that no prompt can be made of too."""
        with self._lock:
            if (source, number) in self._episodes:
                self._episodes.move_to_end((source, number))
                return self._episodes[source, number]
        episode = checked_instructions(source.load(number))
        with self._lock:
            if (source, number) not in self._episodes:
                self._episodes[source, number] = episode
                self._ticks += _counts_as(source, episode)
            while self._ticks > KEPT_TICKS and len(self._episodes) > 1:
                (oldest, _), dropped = self._episodes.popitem(last=False)
                self._ticks -= _counts_as(oldest, dropped)
        return episode

    def clear(self) -> None:
        with self._lock:
            self._episodes.clear()
            self._ticks = 0


def _counts_as(source: Source, episode: Episode) -> int:
    """Ticks."""
    least = 1 if isinstance(source, EpisodeFolder | LeRobotDataset) else -(-KEPT_TICKS // KEPT_EPISODES)
    return max(len(episode.motion), least)


KEPT = Kept()


def load(source: Source, number: int) -> Episode:
    """KEPT.get: for training, which needs words too. Raises DataError."""
    return KEPT.get(source, number)
