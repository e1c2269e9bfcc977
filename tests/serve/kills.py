"""kill -9 of a server that a robot lives on: python -m tests.serve.kills [KILLS [SEED]].

An executor drives at 30 Hz over the network, with actions that tell what they answer (marked.py). Its server is killed
KILLS times, at moments that chance chooses, some of them while it starts, and started again within 2 s, at the same
address. The client comes back by itself each time, and at the end everything is accounted for: every action of every
chunk, every step of the time, every inference; no command was one that the policy had not meant for what the robot had
shown. Whatever is not so is printed and makes the exit code 1. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.executor.support import assert_adds_up
from tests.serve.marked import LENGTH, MarkedRobot
from xr0_engine.drive.policies import Source, from_server
from xr0_engine.executor import Executor, Report, Settings, SystemClock

# Not from tests.support, which takes torch along.
ROOT = Path(__file__).resolve().parents[2]
RATE_HZ = 30.0
DOWN_S = 2.0
STARTS_HIT = 4
"""Of so many kills, one hits a server that has not come up yet."""
PATIENCE_S = 120.0
ROUNDING_STEPS = 3
"""Between the loop's first and last tick and the times that are taken around it."""


@dataclass(frozen=True)
class Kill:
    """answered: chunks since the kill before. at_work: whether it had been asked for one. down_s: until it was started
    again, and had its port. back_s: from then to the next chunk. lost: inferences that got none. held: steps at rest
    meanwhile."""

    answered: int
    at_work: bool
    down_s: float
    back_s: float
    lost: int
    held: int


class Drive:
    """An executor in a thread of its own. robot: for its policy; counts its commands, and those that are wrong.

    faults: what is not as it should be, after its end.
    """

    def __init__(self, url: str, robot: Callable[[Source], Any] = lambda _: MarkedRobot()) -> None:
        self._source = from_server(url, None, None)
        source = self._source.__enter__()
        self.robot = robot(source)
        settings = Settings(source.control_rate_hz, max_prefix=source.max_prefix)
        self.executor = Executor(source.policy, self.robot, source.frame, settings, clock=SystemClock())
        self._took_s = 0.0
        self._thread = threading.Thread(target=self._run, name="drive")
        self._thread.start()

    @property
    def report(self) -> Report:
        return self.executor.report

    def _run(self) -> None:
        begun_s = time.monotonic()
        self.robot.stop = lambda: setattr(self, "_took_s", time.monotonic() - begun_s)
        self.executor.run(1e6)

    def end(self) -> None:
        self.executor.end()
        self._thread.join()
        self._source.__exit__(None, None, None)

    def __enter__(self) -> Drive:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def faults(self) -> list[str]:
        counts, faults = self.report.counts, []
        try:
            assert_adds_up(self.report, LENGTH)
        except AssertionError as error:
            faults.append(f"actions or inferences do not add up: {error}")
        steps = sum(counts[kind] for kind in ("executed", "held", "waited", "missed"))
        if abs(steps - RATE_HZ * self._took_s) > ROUNDING_STEPS:
            faults.append(f"{self._took_s:.1f} s are {RATE_HZ * self._took_s:.0f} steps, {steps} are accounted for")
        if counts["executed"] + counts["held"] != self.robot.commands:
            faults.append(f"{self.robot.commands} commands, {counts['executed']} executed and {counts['held']} held")
        if self.robot.wrong:
            faults.append(f"{self.robot.wrong} commands that no policy meant")
        if self._thread.is_alive() or self.report.ended != "asked to":
            faults.append(f"the loop ended by itself: {self.report.ended}")
        return faults


class KilledServer:
    """A server of marked actions in a process of its own, always on the same port."""

    def __init__(self) -> None:
        self.port = 0
        self.process: subprocess.Popen[str]
        self.start()
        self.wait_until_up()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.serve.echo_server", str(self.port), "marked"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def wait_until_up(self) -> None:
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> KilledServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def kill_again_and_again(kills: int, chance: random.Random) -> dict[str, Any]:
    """Prints a line for each kill. Returns them, the counts, and what was wrong."""
    done: list[Kill] = []
    faults: list[str] = []
    with KilledServer() as server, Drive(f"ws://127.0.0.1:{server.port}") as drive:
        counts = drive.report.counts

        def come_by(condition: Callable[[], bool], what: str) -> bool:
            deadline = time.monotonic() + PATIENCE_S
            while not condition():
                if time.monotonic() > deadline:
                    faults.append(f"kill {len(done) + 1}: {what} for {PATIENCE_S:g} s: {drive.report.last_error}")
                    return False
                time.sleep(0.001)
            return True

        print(f"{'':4} {'chunks':>6} {'at work':>8} {'down':>7} {'back after':>11} {'lost':>5} {'held':>5}", flush=True)
        for number in range(1, kills + 1):
            chunks = counts["chunks"]
            if not come_by(lambda: counts["chunks"] > chunks + 1, "no chunk"):  # noqa: B023
                break
            time.sleep(chance.uniform(0, 1))
            before, kill_s = counts.copy(), time.monotonic()
            at_work = before["inferences"] > before["chunks"] + before["failed"] + before["rejected"]
            server.kill()
            time.sleep(chance.uniform(0, DOWN_S))
            server.start()
            if number % STARTS_HIT == 0:
                time.sleep(chance.uniform(0, 0.5))
                server.kill()
                server.start()
            server.wait_until_up()
            up_s, at_start = time.monotonic(), counts["chunks"]
            if not come_by(lambda: counts["chunks"] > at_start, "no chunk after it came up"):  # noqa: B023
                break
            back_s = time.monotonic() - up_s
            lost, held = (counts[kind] - before[kind] for kind in ("failed", "held"))
            answered, down_s = before["chunks"] - chunks, up_s - kill_s
            done.append(Kill(answered, at_work, round(down_s, 2), round(back_s, 2), lost, held))
            line = f"{number:4} {answered:6} {'yes' if at_work else 'no':>8} {down_s:5.2f} s {back_s:9.2f} s"
            print(f"{line} {lost:5} {held:5}", flush=True)
    faults += drive.faults()
    if counts["failed"] < len(done):
        faults.append(f"{len(done)} kills, and {counts['failed']} inferences that failed: some were not noticed")
    told = {name: count for name, count in counts.items() if count}
    return {"kills": [asdict(kill) for kill in done], "counts": told, "wrong": drive.robot.wrong, "faults": faults}


def show(told: dict[str, Any], kills: int) -> None:
    """The table of docs/reliability.md, and what was wrong."""
    done, counts = told["kills"], told["counts"]
    print("\n| of each kill | least | middle | most |\n|---|---:|---:|---:|")
    rows = {
        "s from a kill until the next server had its port": "down_s",
        "s from then to its first chunk": "back_s",
        "inferences that failed": "lost",
        "steps at rest": "held",
    }
    for title, name in rows.items():
        values = [kill[name] for kill in done] or [0]
        print(f"| {title} | {min(values)} | {median(values):g} | {max(values)} |")
    at_work = sum(kill["at_work"] for kill in done)
    print(
        f"\n{len(done)} kills of {kills}, {at_work} of a server at work; "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
    )
    print(f"commands that no policy meant: {told['wrong']}; faults: {len(told['faults'])}")
    for fault in told["faults"]:
        print(fault)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    result = kill_again_and_again(number, random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1))
    show(result, number)
    print(json.dumps(result))
    sys.exit(bool(result["faults"]) or len(result["kills"]) < number)
