"""A run on the fake, in the process that calls it: imported by processes that must start quickly."""

from __future__ import annotations

from tests.evaluation.fake import a_run
from xr0_engine.evaluation import policies
from xr0_engine.evaluation.episode import Execution
from xr0_engine.evaluation.results import Writer, read_results
from xr0_engine.evaluation.runner import check, plan, run
from xr0_engine.evaluation.worker import Job

# Far more than a step takes, also on a busy machine.
HANG_S = 20.0


class Told:
    """What a watcher was told."""

    def __init__(self):
        self.episodes, self.reasons = [], []

    def ended(self, episode):
        self.episodes.append(episode)

    def repeated(self, reason):
        self.reasons.append(reason)


def a_job(benchmark, folder, source=None, **more):
    return Job(
        benchmark, source or policies.of_expert(), Execution(benchmark.rate_hz, benchmark.execute), folder, **more
    )


def evaluate(
    benchmark, folder, trials=2, jobs=1, modes=("sync",), delays=(0.0,), source=None, desk=None, hang_s=HANG_S, **more
):
    tasks = [task for suite in benchmark.suites().values() for task in suite]
    job = a_job(benchmark, folder, source, **more)
    planned, told = plan(benchmark, tasks, trials, 0, modes, delays), Told()
    check(job, planned)
    with Writer(folder, a_run(), [trial.key for trial in planned]) as writer:
        run(job, planned, writer, told, jobs, hang_s, desk)
    return read_results(folder), told
