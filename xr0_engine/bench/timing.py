"""Timing that can be believed: rivals take turns in one run, warm-up apart, every sample kept."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

StageTimes = Mapping[str, float]
"""Stage -> milliseconds of one call, `total` among them."""

WARM_UP = 2
REDRAW_S = 0.2

BOUNDARIES = {
    "infer": "Engine.infer(), whole call: host preprocessing to actions in robot units",
    "stage": "the stages of Engine.infer(), the device waited for between them",
    "patches": "camera frames to normalised patches; on a GPU from the launch, or from the upload before it",
    "flow": "the action head alone: noise to chunk, all flow steps",
    "replay": "inputs on the device to chunk on the device: CUDA graphs of the whole step and of each stage",
    "update+replay": "preprocessed inputs on the host to chunk on the host: two uploads, one CUDA graph, one download",
    "websocket": "a client on the same machine asks its server, both processes of their own, and holds the actions",
    "process": "a fresh process, from its start to its first action; weights on disk",
}


def check_boundary(name: str, possible: tuple[str, ...]) -> str:
    """The name, if it is possible. Raises ValueError for another."""
    if name not in possible:
        raise ValueError(f"boundary: expected one of {', '.join(possible)}; got {name!r}")
    return name


def take_turns(
    rivals: Mapping[str, Callable[[], StageTimes]],
    rounds: int,
    warm_up: int,
    done: Callable[[], None] = lambda: None,
    stopped: Callable[[BaseException], None] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Call each rival once per round, in an order that alternates, so that a machine that drifts favours none.

    done is called after every call, for progress. stopped: given what interrupted the run (Ctrl-C, an error) once at
    least one round was finished; the finished rounds are then returned. Without it, or earlier, the interruption goes
    on. Returns rival -> stage -> (rounds,) milliseconds, warm-up left out. Raises ValueError for less than one round.
    """
    if rounds < 1 or warm_up < 0:
        raise ValueError(f"rounds, warm_up: expected at least 1 and 0, got {rounds} and {warm_up}")
    finished: list[dict[str, StageTimes]] = []
    try:
        for number in range(-warm_up, rounds):
            calls = {}
            for name in list(rivals)[:: 1 if number % 2 == 0 else -1]:
                calls[name] = rivals[name]()
                done()
            if number >= 0:
                finished.append(calls)
    except BaseException as reason:
        if not finished or stopped is None:
            raise
        stopped(reason)
    return {
        name: {stage: np.array([calls[name][stage] for calls in finished]) for stage in finished[0][name]}
        for name in rivals
    }


def run(
    rivals: Mapping[str, Callable[[], StageTimes]], rounds: int, warm_up: int = WARM_UP
) -> tuple[dict[str, dict[str, list[float]]], BaseException | None]:
    """take_turns with a progress bar: the series of a Result, and what cut it short, if anything did."""
    stopped: list[BaseException] = []
    # It draws between the calls only: its own thread would disturb them.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(rivals) * (rounds + warm_up))

        drawn = time.monotonic()

        def done() -> None:
            nonlocal drawn
            progress.advance(task)
            if time.monotonic() - drawn > REDRAW_S:
                progress.refresh()
                drawn = time.monotonic()

        samples = take_turns(rivals, rounds, warm_up, done, stopped.append)
    series = {name: {stage: times.tolist() for stage, times in stages.items()} for name, stages in samples.items()}
    return series, stopped[0] if stopped else None


def ratio_with_spread(slower: np.ndarray, faster: np.ndarray) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and their quartiles: a round's two calls ran next to each other."""
    ratios = np.asarray(slower) / np.asarray(faster)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


class Stopwatch:
    """Milliseconds between marks, on the wall clock; on a GPU each mark waits for the work queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = self._now()
        self._spans: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        now = self._now()
        self._spans[stage] = 1e3 * (now - self._last)
        self._last = now

    def times(self) -> dict[str, float]:
        return self._spans | {"total": 1e3 * (self._last - self._start)}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class CallTimer:
    """Milliseconds that a device needs for one call: wall clock on a CPU; on a GPU its own events, after its L2 cache
    was overwritten, so that weights come from memory as they do in a robot's control loop.

    The GPU path is not yet measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            # So often that the host meanwhile queues the call: the time between the events holds no wait for it.
            for _ in range(8):
                self._flush.zero_()
            start_event.record()
            call()
            end_event.record()
            end_event.synchronize()
        return float(start_event.elapsed_time(end_event))


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on a GPU what torch allocated there since the reset, on a CPU resident
    since the process began, loading included.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
