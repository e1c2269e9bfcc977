"""Quick steps that stand in for the real ones, run in a process of its own: `python -m ... FOLDER MINUTES STEP...`.

A STEP is `name=behaviour`, or `name=behaviour=step that it needs`. Each says that it began by a line in FOLDER/begun,
with the number of its process.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from xr0_engine.bench.machine import processes
from xr0_engine.bench.machine.plan import Step
from xr0_engine.bench.machine.private import Scrubber
from xr0_engine.bench.machine.run import run
from xr0_engine.bench.machine.state import LOGS, RESULTS, go_on, locked

BEGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, name = Path({folder!r}), {name!r}
with (folder / "begun").open("a") as file:
    file.write(f"{{name}} {{os.getpid()}}\\n")
"""
BEHAVIOURS = {
    "quick": "print('did it')",
    "file": "(folder / 'results' / f'{name}.json').write_text('[1]')",
    "prints": "print('[2]')",
    "prints nonsense": "print('Warning: 1 < 2')",
    "leaves nothing": "pass",
    "breaks off": "(folder / 'results' / f'{name}.json').write_text('{\"schema\": 1')",
    "says no": "print('[3]'); sys.exit(1)",
    "fails": "print('xr0: error: the driver is too old', file=sys.stderr); sys.exit(2)",
    "raises": "raise KeyError('lost')",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "time.sleep(600)",
    "hangs for good": (
        "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    ),
    "leaves a child": "(folder / 'left').write_text(str(subprocess.Popen(['sleep', '600']).pid))",
    "hangs with a child": (
        "child = subprocess.Popen(['sleep', '600'])\n"
        "(folder / 'child').write_text(str(child.pid))\n"
        "while not (folder / 'go').exists(): time.sleep(0.02)\n"
        "child.kill()"
    ),
    "keeps what it has": (
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n"
        "    (folder / 'results' / f'{name}.json').write_text('[4]'); raise"
    ),
    "starts over": "sys.exit(2)",
    "writes much": "(folder / 'results' / f'{name}.json').write_text('[' + '1, ' * 10**6 + '1]')",
    "says where": "print(folder, Path.home())",
}
GRACE_S = {signal.SIGINT: 2.0, signal.SIGTERM: 1.0}
"""Instead of the real ones, to be quick."""
PRINTED = ("prints", "says no", "prints nonsense")
IN_A_FILE = (*PRINTED, "file", "keeps what it has", "starts over", "leaves nothing", "breaks off", "writes much")


def steps(folder: Path, wanted: list[str]) -> list[Step]:
    found = []
    for word in wanted:
        name, behaviour, *after = word.split("=")
        needs = after[0] if after else None
        code = BEGIN.format(folder=str(folder), name=name) + BEHAVIOURS.get(behaviour, "")
        file = f"{name}.json" if behaviour in IN_A_FILE else ""
        left_out = None if behaviour in BEHAVIOURS else behaviour
        times = {"least_s": 1.0, "share": 0.1, "most_s": 1.5 if behaviour.startswith(("hangs", "keeps")) else 60.0}
        if behaviour == "hangs with a child":
            times["most_s"] = 600.0
        found.append(
            Step(
                name,
                "correct",
                behaviour,
                ("-c", code),
                file,
                behaviour in PRINTED,
                left_out=left_out,
                needs=needs,
                **times,
            )
        )
    return found


def main(folder: Path, minutes: float, wanted: list[str]) -> int:
    processes.GRACE_S.update(GRACE_S)
    for each in (folder, folder / RESULTS, folder / LOGS):
        each.mkdir(parents=True, exist_ok=True)
    with locked(folder), processes.stopping() as stop:
        state = go_on(folder, {"commit": "c"})
        end = time.monotonic() + 60 * minutes
        scrub = Scrubber({str(folder): "DIR"})
        run(steps(folder, wanted), state, minutes, end, {"TOLD": "yes"}, stop, scrub, lambda: None, print)
    return 128 + stop.signal if stop.signal else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
