"""What `auto` runs, and why: our kernels where they passed their self-check on this machine, else the reference."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from xr0_engine.backend import auto_checks, triton_fault
from xr0_engine.comparison import Comparison
from xr0_engine.config import ModelConfig
from xr0_engine.env import emulated_arch
from xr0_engine.fused.backends import capability
from xr0_engine.fused.products import refusal_of
from xr0_engine.fused.selfcheck import MARK, NOT_FINITE, WHOLE
from xr0_engine.fused.tactics import TacticTable, stated_defaults, tactics_for
from xr0_engine.fused.verdict import Verdict, identity_of, keep, recall, verdict_path
from xr0_engine.model.quantization import Format, Formats, format_pairs
from xr0_engine.model.weights import check_stored, read_index

TIME_LIMIT_S = 300
"""Most of a first check is the compilation of some sixty kernels. Longer is a hang."""
EMULATED_TIME_LIMIT_S = 3600
"""Where a CPU executes the kernels."""
KEPT_LINES = 60
"""Of standard error: a traceback through torch and Triton."""
PASSING = ("out of memory", "busy or unavailable", "No space left", NOT_FINITE)
"""In the words of a failure: it is the moment's or the checkpoint's, not the kernels'."""
log = logging.getLogger("xr0_engine.selfcheck")


@dataclass(frozen=True)
class Choice:
    """A backend, and why it runs, in one line. table: of the tactics that the kernels passed with, None where nobody
    asked."""

    backend: str
    reason: str
    table: TacticTable | None = None


def chosen(backend: str, device: torch.device, config: ModelConfig, layers: Mapping[str, Format]) -> Choice:
    """A backend that was asked for by name. Raises NotImplementedError if it is the kernels, and they do not run a
    model with these layers in 8 bits there."""
    refusal = refusal_of(layers, config.text.num_layers, capability(device)) if backend == "triton" else None
    if refusal is not None:
        raise NotImplementedError(f"backend: expected auto or reference, got triton: {refusal}")
    return Choice(backend, "asked for by name")


def choose(
    device: torch.device,
    dtype: str,
    folder: Path,
    layers: Mapping[str, Format] = MappingProxyType({}),
    recipe: str | None = None,
    described_by: Path | None = None,
) -> Choice:
    """What `auto` runs on a device for a checkpoint, both of which were found to be usable.

    On a GPU the first call checks the kernels, in processes of their own, and keeps the verdict; a later one reads it.
    Tactics that were predicted have run nowhere: where kernels fail with them, they are checked with stated defaults.
    layers: those in 8 bits; recipe: by which they are quantised as they are read, None if they are stored so.
    described_by: the folder whose config.json says how the checkpoint runs, an adapter's; None: its own. Raises
    CheckpointError for tensors that do not fit config.json.
    """
    if not auto_checks(device):
        return Choice("reference", "the device is no GPU")
    if fault := triton_fault():
        return Choice("reference", fault)
    known, config = tactics_for(device), ModelConfig.load(described_by or folder)
    if refusal := refusal_of(layers, config.text.num_layers, capability(device)):
        return Choice("reference", refusal)
    subjects = [Checked(formats=formats) for formats in format_pairs(layers)]
    subjects.append(Checked(folder, layers, recipe, described_by=described_by))
    found, failed = Choice("reference", ""), list[Verdict]()
    for table in (known, stated_defaults(device)) if known.predicted else (known,):
        verdict = _verdict(subjects, device, dtype, table, config)
        if verdict.outcome == "passed":
            others = "" if table == known else f", with stated defaults: with tactics {known.origin} they did not"
            for before in failed:
                _warn_once(_report(before, "the kernels with stated defaults"))
            return Choice("triton", f"its kernels passed their self-check on {verdict.created[:10]}{others}", table)
        if verdict.outcome == "refused":
            return Choice("reference", verdict.reason)
        failed.append(verdict)
        found = Choice("reference", f"the kernels' self-check: {verdict.told()}")
        if not verdict.lasting:
            break
    for before in failed:
        _warn_once(_report(before, "'reference'"))
    return found


def _verdict(
    subjects: Sequence[Checked], device: torch.device, dtype: str, table: TacticTable, config: ModelConfig
) -> Verdict:
    """The first one of subjects that is no pass, else the last. Kept ones count."""
    for subject in subjects:
        kept = recall(subject.identity(device, dtype, table, config))
        verdict = kept or check_now(device, dtype, table, subject)
        if verdict.outcome != "passed":
            break
    return verdict


@dataclass(frozen=True)
class Checked:
    """What a self-check is of: the first layers of a checkpoint, layers, recipe and described_by as choose has them; or
    the seeded model, in formats of its own."""

    checkpoint: Path | None = None
    layers: Mapping[str, Format] = field(default_factory=dict)
    recipe: str | None = None
    formats: Formats = (None, None)
    described_by: Path | None = None

    def identity(
        self, device: torch.device, dtype: str, table: TacticTable, config: ModelConfig | None
    ) -> dict[str, Any]:
        """As identity_of. config: of the checkpoint; the seeded model has its own."""
        if self.checkpoint is None:
            return identity_of(device, dtype, table, None, self.formats if any(self.formats) else ())
        digest = hashlib.sha256(json.dumps(sorted(self.layers.items())).encode()).hexdigest()[:16]
        told = (*sorted(set(self.layers.values())), digest) if self.layers else ()
        return identity_of(device, dtype, table, config, told)


def check_now(device: torch.device, dtype: str, table: TacticTable, subject: Checked) -> Verdict:
    """Check it in a new process, whatever the cache holds, and keep the verdict. table: the device's, or of stated
    defaults. Raises CheckpointError for tensors that do not fit config.json."""
    config, checkpoint = None, subject.checkpoint
    if checkpoint is not None:
        config = ModelConfig.load(subject.described_by or checkpoint)
        is_stored = bool(subject.layers) and subject.recipe is None
        check_stored(config, read_index(checkpoint, is_stored), subject.layers, is_stored)
    what = "a seeded model" if checkpoint is None else "the checkpoint's first layers"
    told = f"checking the GPU kernels on {what} (once for this GPU and driver; most of it is compiling) ..."
    Console(stderr=True, highlight=False, soft_wrap=True).print(told)
    words = ["--device", str(device), "--dtype", dtype]
    words += [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    words += [] if subject.described_by is None else ["--described-by", str(subject.described_by)]
    words += ["--formats", *(format or WHOLE for format in subject.formats)] if any(subject.formats) else []
    words += [] if subject.recipe is None else ["--quantize", subject.recipe]
    words += [] if table == tactics_for(device) else ["--stated-defaults"]
    limit_s = TIME_LIMIT_S if emulated_arch() is None else EMULATED_TIME_LIMIT_S
    command = [sys.executable, "-m", "xr0_engine.fused.selfcheck", *words]
    verdict = run_check(command, subject.identity(device, dtype, table, config), limit_s)
    keep(verdict)
    return verdict


def run_check(command: list[str], identity: Mapping[str, Any], limit_s: float) -> Verdict:
    """A process that tells what selfcheck.main does, as a verdict. It is stopped after limit_s."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    start = time.monotonic()
    # Files, not pipes: what was told before a hang is there to be read.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": path})
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            # A process that the driver holds cannot be waited for.
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        out.seek(0)
        err.seek(0)
        told = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK) and line.endswith("\n")]
        errors = [line.rstrip() for line in err if line.strip()]
    comparisons = tuple(Comparison(**line["comparison"]) for line in told if "comparison" in line)
    seconds = round(time.monotonic() - start, 1)

    def verdict(outcome: Any, stage: str = "", reason: str = "") -> Verdict:
        lasting = not any(words in reason for words in PASSING)
        kept = () if outcome == "passed" else tuple(errors[-KEPT_LINES:])
        return Verdict(outcome, identity, stage, reason, comparisons, seconds, lasting, kept)

    for each in comparisons:
        if not each.passed:
            reason = f"{each.measure} {each.error:.3g}, at most {each.tolerance:.3g}"
            return verdict("failed", f"{each.quantity} ({each.case})", reason)
    last = told[-1] if told else {}
    if "refused" in last:
        return verdict("refused", "", last["refused"])
    if "done" in last and code == 0:
        return verdict("passed")
    stage = next((line["stage"] for line in reversed(told) if "stage" in line), "start")
    return verdict("failed", stage, _end(code, errors, limit_s))


def _end(code: int | None, errors: list[str], limit_s: float) -> str:
    """Why a process ended that did not finish, in one line. errors: of its standard error."""
    if code is None:
        return f"it did not end within {limit_s:g} s"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    # Behind the last traceback's frames, which are indented, stands the error; CUDA's goes on for lines of advice.
    begin = max((number for number, line in enumerate(errors) if line.startswith("Traceback ")), default=len(errors))
    last = [line for line in errors[begin + 1 :] if not line.startswith(" ")][:1] or errors[-1:]
    return last[0] if last else f"its process ended with code {code}"


def _report(verdict: Verdict, runs: str) -> str:
    """runs: what `auto` runs instead."""
    stage, reason = verdict.why
    path = verdict_path(verdict.identity)
    told = f"and the file {path}" if path.is_file() else "and this message"
    return (
        f"backend auto runs {runs}, which is slower: the GPU kernels failed their self-check on this machine "
        f"({verdict.subject}) at {stage}: {reason}. Please report it with the output of `xr0 doctor --json` {told}; "
        f"`xr0 doctor --check` checks again"
    )


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """Every engine of a process would say it."""
    log.warning(message)
