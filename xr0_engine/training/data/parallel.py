"""Work on many files in several processes, with progress; results in the order of the items, whatever the number."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_pool(processes: int, function: Callable[[Any], Any] | None = None) -> ProcessPoolExecutor:
    """Processes that start afresh (threads and renderers do not survive a fork) and end with this one.

    function: what call_function calls in them; it may be large, since it is sent once.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(function,))


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, title: str
) -> Iterator[Result]:
    """function of every item, in order. With one process, in this one; with more, function and items are pickled."""
    with progress_bar() as progress:
        task = progress.add_task(title, total=len(items))
        if processes == 1 or len(items) <= 1:
            for item in items:
                yield function(item)
                progress.advance(task)
            return
        with worker_pool(min(processes, len(items)), function) as pool:
            for result in pool.map(call_function, items):
                yield result
                progress.advance(task)


def progress_bar() -> Progress:
    """On standard error, with the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


_function: Callable[[Any], Any] | None = None


def call_function(item: Any) -> Any:
    """In a worker: the pool's function of an item."""
    assert _function is not None
    return _function(item)


def _begin(function: Callable[[Any], Any] | None) -> None:
    global _function
    _function = function
    end_with_parent()


def end_with_parent(_: object = None) -> None:
    """In a worker: end when the process that started it ends, however that ends.

    A worker waiting for its next item, or for a reader of its last one, would outlive a parent that was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
