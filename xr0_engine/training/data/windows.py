"""Every observation of a dataset and the chunk that follows it, by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xr0_engine.training.data.augment import augment
from xr0_engine.training.data.description import COLUMNS
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.samples import RobotSample
from xr0_engine.training.data.sources import Source, load


@dataclass(frozen=True, eq=False)
class Chunk:
    """actions: (T, 32) float64, robot units. mask: (T, 32) bool, what may be supervised."""

    actions: np.ndarray
    mask: np.ndarray


def chunk_at(episode: Episode, tick: int, length: int) -> Chunk:
    """The targets that follow a tick. Nothing of an `invalid` episode may be supervised, nor steps beyond the end."""
    mask = np.zeros((length, COLUMNS), bool)
    if episode.status != "invalid":
        mask[: len(episode.motion) - tick] = episode.motion.columns
    return Chunk(np.where(mask, episode.motion.actions(tick, length), 0), mask)


class Windows:
    """The windows of some episodes of a source: one for each tick. Episodes that are `invalid` have none.

    episodes: their numbers in the source. chunk_length: T.
    """

    def __init__(self, source: Source, episodes: Sequence[int], chunk_length: int) -> None:
        self.source = source
        self.chunk_length = chunk_length
        self.episodes = tuple(number for number in episodes if source.statuses[number] != "invalid")
        self._ends = np.cumsum([source.lengths[number] for number in self.episodes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int, rng: np.random.Generator | None = None) -> RobotSample:
        """The window of a number from 0 to len - 1. Raises DataError that names file and frame.

        rng: draws one of the instruction's wordings, and the augmentation; None takes the first wording, and the
        images as they are.
        """
        place = int(np.searchsorted(self._ends, index, side="right"))
        tick = index - (int(self._ends[place - 1]) if place else 0)
        episode = load(self.source, self.episodes[place])
        chunk = chunk_at(episode, tick, self.chunk_length)
        views = [view.key for view in self.source.description.embodiment.views]
        images = {view: episode.image(view, tick) for view in views}
        wording = 0
        if episode.instruction_at is not None:
            wording = int(episode.instruction_at[tick])
        elif rng is not None:
            wording = int(rng.integers(len(episode.instructions)))
        return RobotSample(
            images=images if rng is None else augment(images, rng),
            instruction=episode.instructions[wording],
            state=episode.motion.state(tick),
            actions=chunk.actions.astype(np.float32),
            mask=chunk.mask,
            robot_type=self.source.description.robot_type,
            source=f"{episode.name}:{tick}",
        )

    def spread(self, count: int) -> Iterator[RobotSample]:
        """Up to count windows, evenly over all of them, without augmentation."""
        for index in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)):
            yield self.sample(int(index))
