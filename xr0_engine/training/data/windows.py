"""Every observation of a dataset and the chunk that follows it, by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xr0_engine.robot.embodiment import View
from xr0_engine.robot.history import FrameHistory
from xr0_engine.robot.images import aspect_fault
from xr0_engine.robot.views import orient
from xr0_engine.training.data.augment import augment, recolor_alike
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.kept import load
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.pictures import check_stride
from xr0_engine.training.data.samples import DataError, RobotSample, UnfitError
from xr0_engine.training.data.sources import EpisodeFolder, Source, slowest_fps


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

    frames: view key -> (height, width, 3) uint8, as stored, or of a video (frames, height, width, 3), whose result has
    as many, all changed alike. views: Description.stored_views. rng: draws the augmentation, in which a crop of the
    same size at a random place stands for a view's centre crop, unless random_crop is False.
    """
    if rng is None or not random_crop:
        images = {view.key: orient(frames[view.key], view) for view in views}
        return images if rng is None else recolor_alike(images, rng)
    whole = {view.key: orient(frames[view.key], replace(view, center_crop=1.0)) for view in views}
    return augment(whole, rng, {view.key: view.center_crop for view in views if view.center_crop < 1})


def past_ticks(episode: Episode, tick: int, history: FrameHistory) -> list[int]:
    """The ticks that a history shows at one, the oldest first, as robot.history.History does at run time: where it
    reaches back beyond the episode's begin, or a gap, the first tick behind that is taken again."""
    begin = episode.begin_before(tick)
    return [begin + place for place in history.places(tick - begin + 1)]


class Windows:
    """The windows of some episodes of a source: one for each tick. Episodes that are `invalid` have none.

    episodes: their numbers in the source. chunk_length: T. random_crop: as in prepare. state_length: states that the
    model takes, as far apart as the frames of the profile's history. Raises DataError for several states and a profile
    without one: nothing says how far apart they are; UnfitError for videos whose frames are closer together than what
    was recorded (pictures.py: check_stride).
    """

    def __init__(
        self,
        source: Source,
        episodes: Sequence[int],
        chunk_length: int,
        random_crop: bool = True,
        state_length: int = 1,
    ) -> None:
        self.source, self.random_crop = source, random_crop
        profile = source.description.embodiment
        if state_length > 1 and profile.history is None:
            raise DataError(
                f"{source.description.folder}: the model takes {state_length} states, and its profile {profile.name!r} "
                "has no `history`, which says how many ticks they are apart: train through a profile with one "
                "(data.embodiment)"
            )
        self._history = profile.history
        self._states = FrameHistory(state_length, self._history.stride if self._history else 1)
        self.chunk_length = chunk_length
        self.episodes = tuple(number for number in episodes if source.statuses[number] != "invalid")
        self._ends = np.cumsum([source.lengths[number] for number in self.episodes], dtype=np.int64)
        self._check_strides()

    def _check_strides(self) -> None:
        """Of all episodes; of a function's, which may be made when they are loaded, of the first that can be: the
        others when they are drawn."""
        if self._history is None:
            return
        source = self.source
        if isinstance(source, EpisodeFolder | LeRobotDataset):
            for number in self.episodes:
                check_stride(source.description.embodiment, source.fps[number], source.names[number])
            return
        for number in self.episodes:
            try:
                self._load(number)
            except UnfitError:
                raise
            except DataError:
                continue
            break

    def _load(self, number: int) -> Episode:
        """An episode whose pictures the profile's videos can be made of. Raises DataError, UnfitError."""
        episode = load(self.source, number)
        if self._history is not None:
            description = self.source.description
            check_stride(description.embodiment, slowest_fps(episode, description), episode.name)
        return episode

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int, rng: np.random.Generator | None = None) -> RobotSample:
        """The window of a number from 0 to len - 1. Raises DataError that names file and frame.

        rng: draws one of the instruction's wordings, and the augmentation; None takes the first wording, and prepares
        the images as at run time.
        """
        place = int(np.searchsorted(self._ends, index, side="right"))
        tick = index - (int(self._ends[place - 1]) if place else 0)
        episode = self._load(self.episodes[place])
        chunk = chunk_at(episode, tick, self.chunk_length)
        views = self.source.description.stored_views
        frames = {view.key: self._frames(episode, view.key, tick) for view in views}
        wording = 0
        if episode.instruction_at is not None:
            wording = int(episode.instruction_at[tick])
        elif rng is not None:
            wording = int(rng.integers(len(episode.instructions)))
        images = prepare(frames, views, rng, self.random_crop)
        for key, image in images.items():
            if fault := aspect_fault(*image.shape[-3:-1]):
                raise DataError(f"{episode.clips[key].path}: {fault}; a profile with `resize` gives it another")
        return RobotSample(
            images=images,
            instruction=episode.instructions[wording],
            state=np.concatenate([episode.motion.state(past) for past in past_ticks(episode, tick, self._states)]),
            actions=chunk.actions.astype(np.float32),
            mask=chunk.mask,
            robot_type=self.source.description.robot_type,
            source=f"{episode.name}:{tick}",
        )

    def _frames(self, episode: Episode, view: str, tick: int) -> np.ndarray:
        """(height, width, 3) uint8, or (frames, height, width, 3) where the profile has a history; each tick's picture
        is read once, in the order of time, in which a file is decoded from one to the next. Raises DataError."""
        if self._history is None:
            return episode.image(view, tick)
        ticks = past_ticks(episode, tick, self._history)
        read = {past: episode.image(view, past) for past in dict.fromkeys(ticks)}
        if len(sizes := {image.shape for image in read.values()}) > 1:
            raise DataError(f"{episode.clips[view].path}: frames of several sizes: {sorted(sizes)}")
        return np.stack([read[past] for past in ticks])

    def spread(self, count: int, skip_broken: bool = False) -> Iterator[RobotSample]:
        """Up to count windows, evenly over all of them, without augmentation. Raises DataError unless it is skipped."""
        for index in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)):
            try:
                sample = self.sample(int(index))
            except DataError as error:
                if not skip_broken or isinstance(error, UnfitError):
                    raise
                continue
            yield sample
