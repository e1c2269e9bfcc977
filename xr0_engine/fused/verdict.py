"""What a self-check of the GPU kernels found, and the cache that keeps it for this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from xr0_engine import __version__
from xr0_engine.comparison import Comparison
from xr0_engine.config import ModelConfig
from xr0_engine.env import cache_dir, emulated_arch
from xr0_engine.files import flag, number, one_line, read_json, reading, section, text, whole
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.quantization import FORMATS
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

SCHEMA = 1
FOLDER = "selfcheck"
"""Within the cache."""
SOURCES = ("fused", "kernels", "model")
"""Folders of the package whose code the verdict is about."""
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
Outcome = Literal["passed", "failed", "refused"]
log = logging.getLogger("xr0_engine.selfcheck")


@dataclass(frozen=True)
class Verdict:
    """What a self-check found.

    outcome: `refused` is no fault: the kernels do not have this model. stage: where it failed, first. reason: why it
    did not pass, in one line. identity: what it holds for, as `identity_of` gives it. comparisons: all that was
    measured. lasting: false for what may be otherwise the next time, such as a GPU without free memory; it is not kept.
    errors: the last that its process wrote to standard error, if it did not pass.
    """

    outcome: Outcome
    identity: Mapping[str, Any]
    stage: str = ""
    reason: str = ""
    comparisons: tuple[Comparison, ...] = ()
    seconds: float = 0.0
    lasting: bool = True
    errors: tuple[str, ...] = ()
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def subject(self) -> str:
        """`seeded model, bfloat16`; `checkpoint, bfloat16, int8 and int8-weights`."""
        model = self.identity["model"]
        formats = sorted({word for word in model.get("eight_bits", ()) if word in FORMATS})
        words = ["seeded model" if model["sizes"] is None else "checkpoint", model["dtype"], " and ".join(formats)]
        return ", ".join(filter(None, words))

    def told(self) -> str:
        """In one line."""
        if self.outcome == "passed":
            return f"{self.subject}: passed on {self.created[:10]}"
        return f"{self.subject}: {self.outcome} on {self.created[:10]}: {': '.join(filter(None, self.why))}"

    @property
    def why(self) -> tuple[str, str]:
        return self.stage, self.reason


def identity_of(
    device: torch.device,
    dtype: str,
    table: TacticTable,
    config: ModelConfig | None = None,
    eight_bits: Sequence[str | None] = (),
) -> dict[str, Any]:
    """What a verdict holds for. config: of the checkpoint whose first layers are checked; None is the seeded model.
    eight_bits: which layers have what format, in words; those that are formats are told.

    Checkpoints of the same sizes, with the same layers in 8 bits, share a verdict.
    """
    sizes = None if config is None else {part: asdict(getattr(config, part)) for part in ("text", "vision", "head")}
    tactics = hashlib.sha256(json.dumps(asdict(table), sort_keys=True).encode()).hexdigest()[:16]
    model = {"dtype": dtype, "tactics": tactics, "sizes": sizes, "eight_bits": list(eight_bits)}
    # Tuples become the lists that a file gives back.
    return json.loads(json.dumps({"machine": machine_of(device), "model": model}))


def machine_of(device: torch.device) -> dict[str, str]:
    """A GPU, or what executes kernels in its place, and the versions of all that runs on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver_version(),
        }
    else:
        arch = emulated_arch()
        gpu = {"gpu": "Triton's interpreter" if arch is None else f"emulated sm_{arch}", "capability": "", "driver": ""}
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__, "xr0-engine": __version__}
    return {**gpu, **versions, "sources": _sources()}


def driver_version() -> str:
    """Of the NVIDIA driver; `unknown` where neither the kernel module nor nvidia-smi tells it."""
    if KERNEL_MODULE.is_file():
        found = re.search(r"\b\d{3,}(\.\d+)+\b", KERNEL_MODULE.read_text(encoding="utf-8"))
        if found:
            return found[0]
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        told = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told[0] if told else "unknown"


def verdict_path(identity: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / FOLDER / f"{key}.json"


def keep(verdict: Verdict) -> Path | None:
    """Where it is kept from now on; None for what does not last, and where the cache cannot be written."""
    if not verdict.lasting:
        return None
    path = verdict_path(verdict.identity)
    try:
        write_whole(path, json.dumps({"schema": SCHEMA, **_as_json(verdict)}, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        log.warning("the self-check's verdict cannot be kept, so every start checks again: %s", error)
        return None
    return path


def recall(identity: Mapping[str, Any]) -> Verdict | None:
    """The verdict kept for exactly this, None where there is none or its file is damaged."""
    verdict = _read(verdict_path(identity))
    return verdict if verdict is not None and verdict.identity == identity else None


def verdicts_on(machine: Mapping[str, str]) -> list[Verdict]:
    """All that are kept for this machine as it now is, newest last."""
    found = filter(None, map(_read, (cache_dir() / FOLDER).glob("*.json")))
    return sorted((each for each in found if each.identity["machine"] == machine), key=lambda each: each.created)


def forget(machine: Mapping[str, str]) -> None:
    """Drop what is kept for this machine, so that it is checked again at the next use."""
    for verdict in verdicts_on(machine):
        verdict_path(verdict.identity).unlink(missing_ok=True)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    # What is not finite, JSON does not have.
    told = asdict(verdict)
    for each in told["comparisons"]:
        each["error"] = each["error"] if math.isfinite(each["error"]) else None
    return told


def _read(path: Path) -> Verdict | None:
    # A damaged file is no verdict: the check is made again, and writes it anew.
    try:
        with reading(path, FileError):
            return _verdict(read_json(path, FileError))
    except (OSError, FileError) as fault:
        if path.exists():
            log.debug("no verdict: %s", one_line(fault))
        return None


def _verdict(content: Mapping[str, Any]) -> Verdict:
    """Raises what `reading` reads."""
    whole(content, "schema", least=SCHEMA, most=SCHEMA)
    identity, errors = section(content, "identity"), content["errors"]
    model, machine = section(identity, "model"), section(identity, "machine")
    text(model, "dtype")
    if model["sizes"] is not None:
        section(model, "sizes")
    for name in machine:
        text(machine, name)
    if not isinstance(errors, list) or not all(isinstance(each, str) for each in errors):
        raise TypeError(f"errors is {errors!r:.80}, not a list of lines")
    outcome: Outcome = content["outcome"]
    if outcome not in get_args(Outcome):
        raise ValueError(f"outcome: expected one of {', '.join(get_args(Outcome))}, got {outcome!r:.80}")
    comparisons = tuple(
        Comparison(
            case=text(each, "case"),
            quantity=text(each, "quantity"),
            error=math.nan if each["error"] is None else number(each, "error"),
            tolerance=number(each, "tolerance"),
            measure=text(each, "measure"),
        )
        for each in content["comparisons"]
    )
    words = {name: text(content, name) for name in ("stage", "reason", "created")}
    return Verdict(
        outcome=outcome,
        identity=identity,
        comparisons=comparisons,
        seconds=number(content, "seconds"),
        lasting=flag(content, "lasting"),
        errors=tuple(errors),
        **words,
    )


def _sources() -> str:
    """A checkout's kernels may change from one minute to the next."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (package / folder).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
