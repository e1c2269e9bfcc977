"""Every observation of a dataset and the chunk that follows it, by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xr0_engine.robot.embodiment import View
from xr0_engine.robot.images import aspect_fault
from xr0_engine.robot.views import orient
from xr0_engine.training.data.augment import augment, recolor_alike
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.samples import DataError, RobotSample
from xr0_engine.training.data.sources import Source, load


@dataclass(frozen=True, eq=False)
class Chunk:
    """actions: (T, A) float64, robot units. mask: (T, A) bool, what may be supervised."""

    actions: np.ndarray
    mask: np.ndarray


def chunk_at(episode: Episode, tick: int, length: int) -> Chunk:
    """The targets that follow a tick. Nothing of an `invalid` episode may be supervised, nor steps beyond the end.

    Where ticks are missing, the steps before the gap are all that follows.
    """
    mask = np.zeros((length, len(episode.motion.columns)), bool)
    if episode.status != "invalid":
        mask[: episode.end_after(tick) - tick] = episode.motion.columns
    return Chunk(np.where(mask, episode.motion.actions(tick, length), 0), mask)


def prepare(
    frames: Mapping[str, np.ndarray],
    views: Sequence[View],
    rng: np.random.Generator | None = None,
    random_crop: bool = True,
) -> dict[str, np.ndarray]:
    """View key -> (height, width, 3) uint8: the frames as the model's processor is given them.

    frames: view key -> (height, width, 3) uint8, as stored. views: Description.stored_views. rng: draws the
    augmentation, in which a crop of the same size at a random place stands for a view's centre crop, unless random_crop
    is False.
    """
    if rng is None or not random_crop:
        images = {view.key: orient(frames[view.key], view) for view in views}
        return images if rng is None else recolor_alike(images, rng)
    whole = {view.key: orient(frames[view.key], replace(view, center_crop=1.0)) for view in views}
    return augment(whole, rng, {view.key: view.center_crop for view in views if view.center_crop < 1})


class Windows:
    """The windows of some episodes of a source: one for each tick. Episodes that are `invalid` have none.

    episodes: their numbers in the source. chunk_length: T. random_crop: as in prepare.
    """

    def __init__(self, source: Source, episodes: Sequence[int], chunk_length: int, random_crop: bool = True) -> None:
        self.source, self.random_crop = source, random_crop
        self.chunk_length = chunk_length
        self.episodes = tuple(number for number in episodes if source.statuses[number] != "invalid")
        self._ends = np.cumsum([source.lengths[number] for number in self.episodes], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int, rng: np.random.Generator | None = None) -> RobotSample:
        """The window of a number from 0 to len - 1. Raises DataError that names file and frame.

        rng: draws one of the instruction's wordings, and the augmentation; None takes the first wording, and prepares
        the images as at run time.
        """
        place = int(np.searchsorted(self._ends, index, side="right"))
        tick = index - (int(self._ends[place - 1]) if place else 0)
        episode = load(self.source, self.episodes[place])
        chunk = chunk_at(episode, tick, self.chunk_length)
        views = self.source.description.stored_views
        frames = {view.key: episode.image(view.key, tick) for view in views}
        wording = 0
        if episode.instruction_at is not None:
            wording = int(episode.instruction_at[tick])
        elif rng is not None:
            wording = int(rng.integers(len(episode.instructions)))
        images = prepare(frames, views, rng, self.random_crop)
        for key, image in images.items():
            if fault := aspect_fault(*image.shape[:2]):
                raise DataError(f"{episode.clips[key].path}: {fault}; a profile with `resize` gives it another")
        return RobotSample(
            images=images,
            instruction=episode.instructions[wording],
            state=episode.motion.state(tick),
            actions=chunk.actions.astype(np.float32),
            mask=chunk.mask,
            robot_type=self.source.description.robot_type,
            source=f"{episode.name}:{tick}",
        )

    def spread(self, count: int, skip_broken: bool = False) -> Iterator[RobotSample]:
        """Up to count windows, evenly over all of them, without augmentation. Raises DataError unless it is skipped."""
        for index in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)):
            try:
                sample = self.sample(int(index))
            except DataError:
                if not skip_broken:
                    raise
                continue
            yield sample
