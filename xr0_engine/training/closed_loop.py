"""Closed-loop validation: every so many steps a function of the user's drives a robot with the policy as it is.

`run.closed_loop=package.module:function` names it. Training is the same with it and without, bit for bit: the function
gets an engine on a copy of the weights, and what it does to random numbers and threads is undone.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from xr0_engine.engine import Engine
from xr0_engine.files import is_number
from xr0_engine.training.named import find, mark, told
from xr0_engine.training.validation import CLOSED_LOOP

ClosedLoop = Callable[[Engine], Mapping[str, float]]
Marked = TypeVar("Marked", bound=ClosedLoop)

FOLDER = "closed-loop"
"""Within a run's folder: where the policy lies while it drives."""


def closed_loop(function: Marked) -> Marked:
    """Marks a function as closed-loop validation that runs may name.

    It is called in the main process, while training waits, with the engine that `xr0 train export` would make of the
    current weights, in the run's dtype. It returns numbers by name, such as {"success": 0.6}, for metrics.jsonl,
    TensorBoard and curve.png: as many names each time, none of them NaN or infinite. What it raises ends the run.
    """
    return mark(function, "closed-loop validation")


def find_closed_loop(name: str) -> ClosedLoop:
    """The function of a name. Raises ValueError."""
    try:
        return find(name, "closed-loop validation", "xr0_engine.training.closed_loop.closed_loop")
    except ValueError as error:
        raise ValueError(f"run.closed_loop: {error}") from error


def drive(
    name: str, function: ClosedLoop, folder: Path, write: Callable[[Path], None], device: torch.device, dtype: str
) -> dict[str, float]:
    """What the function says of a policy, its names behind CLOSED_LOOP.

    folder: for the policy, emptied before and removed after. write: writes it there as a folder that the engine loads.
    Raises RuntimeError, with the function's name and place, for what it raises, ValueError for what is no such result.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write(folder)
        with undisturbed(device):
            engine = Engine.from_pretrained(folder, device=str(device), dtype=dtype, backend="reference")
            try:
                result = function(engine)
            # Whatever goes wrong in somebody else's function.
            except Exception as error:
                raise RuntimeError(f"run.closed_loop: {name} failed: {told(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {f"{CLOSED_LOOP}{key}": value for key, value in _numbers(name, result).items()}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Undo what happens inside to the process's random numbers, number of threads and defaults of torch."""
    python, numpy = random.getstate(), np.random.get_state()
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


def _numbers(name: str, result: Any) -> dict[str, float]:
    if not isinstance(result, Mapping) or not result or not all(isinstance(key, str) and key for key in result):
        raise ValueError(f"run.closed_loop: {name} returned {result!r:.80}: expected numbers by name")
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in result.items()}
    for key, value in values.items():
        if not (isinstance(value, bool) or is_number(value)) or not math.isfinite(value):
            raise ValueError(f"run.closed_loop: {name} returned {key} = {value!r:.80}: expected a finite number")
    return {key: float(value) for key, value in values.items()}
