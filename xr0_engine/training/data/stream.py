"""The endless, sharded, resumable stream of training batches.

Sample number n of a run is a pure function of the seed and n: which dataset, which window, which augmentation. So the
stream is the same for any number of workers, processes share it without talking, and its whole state is one number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.order import Interleaved
from xr0_engine.training.data.parallel import end_with_parent
from xr0_engine.training.data.samples import DataError, LanguageSample, RobotSample
from xr0_engine.training.data.sources import NamedSource, open_source, split
from xr0_engine.training.data.windows import Windows

# Batches that each worker has ready.
PREFETCH = 2


@dataclass(frozen=True)
class Mixture:
    """What to train on. Every dataset is `path` or `path=weight`, weights relative, 1 if not given.

    robot: folders of episodes or LeRobot datasets, YAML files that describe one, or names of functions that open one,
    `package.module:function` (sources.py: dataset). language: JSONL files.
    language_every: every n-th batch is of language (7 gives 1 : 6), 0 = none.
    validation: datasets for validation; if there are none, validation_fraction of the episodes of `robot` is held out.
    skip_broken: do without samples that cannot be read: in training others take their place.
    embodiment: the profile that all datasets are seen through; None = each through its own. random_crop: whether
    augmentation crops at random places. state_length: as in Windows.
    """

    robot: tuple[str, ...]
    language: tuple[str, ...] = ()
    language_every: int = 0
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.1
    skip_broken: bool = False
    embodiment: Embodiment | None = None
    random_crop: bool = True
    state_length: int = 1

    def __post_init__(self) -> None:
        if not self.robot:
            raise ValueError("robot: expected at least one dataset, got none")
        if self.language_every < 0 or self.language_every == 1:
            raise ValueError(f"language_every: expected 0 or at least 2, got {self.language_every}")
        if bool(self.language) != bool(self.language_every):
            raise ValueError("language, language_every: expected both or neither")


def training_windows(mixture: Mixture, chunk_length: int) -> list[Windows]:
    """The windows to train on, a dataset each: without what is held out. Raises DataError."""
    fraction = 0.0 if mixture.validation else mixture.validation_fraction
    return [windows for windows, _ in _split_windows(mixture, chunk_length, fraction)]


def validation_samples(mixture: Mixture, chunk_length: int, count: int) -> Iterator[RobotSample]:
    """About count samples, evenly over the datasets for validation or what is held out; always the same ones.

    Raises DataError for one that cannot be read, unless mixture.skip_broken does without it.
    """
    if mixture.validation:
        parts = []
        for text in mixture.validation:
            source = open_source(weighted(text)[0], mixture.skip_broken, mixture.embodiment)
            episodes = range(len(source.names))
            parts.append(Windows(source, episodes, chunk_length, state_length=mixture.state_length))
    else:
        parts = [held_out for _, held_out in _split_windows(mixture, chunk_length, mixture.validation_fraction)]
    total = sum(map(len, parts))
    if not total:
        raise ValueError("validation: expected datasets, or a validation_fraction that holds some episode out")
    for part in parts:
        if len(part):
            yield from part.spread(max(1, round(count * len(part) / total)), mixture.skip_broken)


class Stream:
    """Batches without end: list[RobotSample], or list[LanguageSample] for every mixture.language_every-th.

    batch_size: samples of this process. rank, world_size: which share of the run's samples is this process's.
    workers: processes that read ahead; 0 reads when asked. augment: see augment.py. With mixture.skip_broken, samples
    that cannot be read are replaced by others, counted in `skipped`; otherwise they raise DataError. Raises DataError
    for datasets that cannot be opened, ValueError for other arguments. close() ends the workers.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        chunk_length: int = 30,
        augment: bool = True,
    ) -> None:
        if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size, workers, rank: expected at least 1, at least 0, 0 to world_size - 1, "
                f"got {batch_size}, {workers}, {rank} of {world_size}"
            )
        windows = training_windows(mixture, chunk_length)
        self._reader = _Reader(
            robot=Interleaved(windows, [weighted(text)[1] for text in mixture.robot], mixture.robot, seed),
            language=Interleaved(
                [LanguageLines(weighted(text)[0]) for text in mixture.language],
                [weighted(text)[1] for text in mixture.language],
                mixture.language,
                seed + 1,
            )
            if mixture.language
            else None,
            language_every=mixture.language_every,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            augment=augment,
            skip_broken=mixture.skip_broken,
        )
        self._workers = workers
        self._identity = _identity(self._reader, windows, mixture, seed, chunk_length)
        self._batches: Iterator[_Batch] | None = None
        self._next = 0
        self.skipped = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> list[RobotSample] | list[LanguageSample]:
        if self._batches is None:
            self._batches = self._read_from(self._next)
        batch = next(self._batches)
        if batch.fault is not None:
            # The place stays: who goes on after the error gets the same batch again.
            self.close()
            raise DataError(batch.fault)
        self._next += 1
        self.skipped += batch.skipped
        return batch.samples

    def state_dict(self) -> dict[str, Any]:
        """Everything that load_state_dict needs to go on after the last batch given."""
        return {"batches": self._next, "skipped": self.skipped, "identity": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of the same arguments stood. Raises ValueError if the data or arguments differ.

        The number of workers may differ, and the rank: all ranks stand at the same place.
        """
        if state["identity"] != self._identity:
            raise ValueError(
                "data: the state is of other datasets, weights, seed, batch size or world size; "
                "start a new run, or give what it was saved with"
            )
        self.close()
        self._next, self.skipped = int(state["batches"]), int(state["skipped"])

    def close(self) -> None:
        """End the workers. The next batch starts them anew."""
        self._batches = None

    def _read_from(self, first: int) -> Iterator[_Batch]:
        if not self._workers:
            return map(self._reader.batch, itertools.count(first))
        from torch.utils.data import DataLoader

        loader: DataLoader[_Batch] = DataLoader(
            _AsDataset(self._reader),  # type: ignore[arg-type]
            sampler=_Numbers(first),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=PREFETCH,
            collate_fn=_as_it_is,
            # Threads of PyAV and pyarrow do not survive a fork.
            multiprocessing_context="spawn",
            worker_init_fn=end_with_parent,
        )
        return iter(loader)


@dataclass(frozen=True, eq=False)
class _Batch:
    """What a worker hands over. fault: why there are no samples."""

    samples: list[Any]
    skipped: int = 0
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class _Reader:
    """Batch number -> batch, the same in every process."""

    robot: Interleaved
    language: Interleaved | None
    language_every: int
    batch_size: int
    rank: int
    world_size: int
    augment: bool
    skip_broken: bool

    def batch(self, number: int) -> _Batch:
        data, number = self._which(number)
        first = (number * self.world_size + self.rank) * self.batch_size
        samples, skipped = [], 0
        for draw in range(first, first + self.batch_size):
            try:
                sample, broken = data.sample(draw, self.augment, self.skip_broken)
            except DataError as error:
                return _Batch([], fault=str(error))
            samples.append(sample)
            skipped += broken
        return _Batch(samples, skipped)

    def _which(self, number: int) -> tuple[Interleaved, int]:
        """The kind of data of a batch, and which batch of that kind it is."""
        if self.language is None:
            return self.robot, number
        languages = (number + 1) // self.language_every
        if (number + 1) % self.language_every == 0:
            return self.language, languages - 1
        return self.robot, number - languages


def weighted(text: str) -> tuple[Path, float]:
    """`path` or `path=weight` -> both, the weight 1 if not given. Raises ValueError for a weight that is none."""
    path, equals, number = text.rpartition("=")
    if not equals:
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"dataset: expected path or path=weight, the weight above 0, got {text!r}")
    return Path(path), weight


def _split_windows(mixture: Mixture, chunk_length: int, fraction: float) -> Iterator[tuple[Windows, Windows]]:
    for text in mixture.robot:
        source = open_source(weighted(text)[0], mixture.skip_broken, mixture.embodiment)
        train, held_out = split(source, fraction)
        yield (
            Windows(source, train, chunk_length, mixture.random_crop, mixture.state_length),
            Windows(source, held_out, chunk_length, state_length=mixture.state_length),
        )


def _identity(reader: _Reader, windows: list[Windows], mixture: Mixture, seed: int, chunk_length: int) -> str:
    """What a position in the stream is a position in."""
    sizes = [[len(data) for data in part.datasets] for part in (reader.robot, reader.language) if part is not None]
    weights = [[weighted(text)[1] for text in part] for part in (mixture.robot, mixture.language)]
    facts = [sizes, weights, mixture.language_every, mixture.validation_fraction, seed, chunk_length]
    facts += [reader.batch_size, reader.world_size, reader.augment]
    if not mixture.random_crop:
        facts.append("no random crop")
    # A folder's content is not looked at; a function's is easily another without anybody's noticing.
    if digests := [it.source.digest for it in windows if isinstance(it.source, NamedSource)]:
        facts.append(digests)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _AsDataset:
    """The reader under the name that DataLoader calls."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def __getitem__(self, number: int) -> _Batch:
        return self._reader.batch(number)


class _Numbers:
    """first, first + 1, ... without end, as a DataLoader's sampler."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._first)


def _as_it_is(batch: Any) -> Any:
    return batch
