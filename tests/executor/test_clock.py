"""The clock sleeps long enough, and nothing stops the loop meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tests.executor.support import MarkedRobot, execute
from xr0_engine.executor import SystemClock, VirtualClock
from xr0_engine.executor.clock import short_collections


def test_system_clock_sleeps_at_least_so_long():
    clock = SystemClock()
    due = clock.now() + 0.02
    clock.sleep_until(due)
    assert clock.now() >= due
    clock.sleep_until(due)


@pytest.mark.parametrize("frozen_by_caller", [False, True], ids=["by the run alone", "by the caller too"])
def test_no_full_garbage_collection_while_it_runs(frozen_by_caller):
    # Counting takes milliseconds: at the first command alone.
    executing = []
    clock = VirtualClock(100.0)
    if frozen_by_caller:
        gc.freeze()
    try:
        look = MarkedRobot(clock, on_command=lambda _: executing or executing.append(gc.get_freeze_count()))
        execute(clock=clock, robot=look)
        assert executing[0] > 1000
        assert bool(gc.get_freeze_count()) == frozen_by_caller
    finally:
        gc.unfreeze()


def test_the_first_run_that_ends_leaves_the_others_their_short_collections():
    first, second = short_collections(), short_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_freeze_count() > 1000
    second.__exit__(None, None, None)
    assert not gc.get_freeze_count()


def test_the_executor_needs_no_torch():
    code = "import sys, xr0_engine.executor; sys.exit(bool({'torch', 'matplotlib', 'mujoco'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
