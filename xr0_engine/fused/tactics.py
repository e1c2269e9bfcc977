"""Tactic tables: which kernel variant runs for which shape, as measured on one kind of GPU (`xr0 bench tune`), or, for
chips that were not at hand, as a model predicts it (`xr0 bench tune --predict`). What was measured always wins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import torch

from xr0_engine.env import cache_dir
from xr0_engine.files import flag, number, parse_json, read_bytes, reading, section, text, whole
from xr0_engine.fused.backends import capability
from xr0_engine.fused.ops import Flow, Tactic
from xr0_engine.kernels.arguments import Schedule
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

SCHEMA = 1
LARGEST = 1 << 12
"""Of a block, a number of warps, stages, programs or layers."""


@dataclass(frozen=True)
class TacticTable:
    """What was measured on one kind of GPU, or predicted for a compute capability.

    tactics: key (ops.tactic_key) -> tactic. overlap: beside how many of the VLM's last layers the flow's first step
    runs, True for all that it reads, False for none; its kernels are chained then. flow: how it runs otherwise. ahead:
    where calls wait for each other, the next one's vision runs beside this one's flow (lookahead.py), overlap or not.
    programs: as FusedOps has it.
    measured: key -> {candidate: microseconds}, winner first; predicted: they, and what follows from them, are a
    model's. environment: versions, driver, commit.
    """

    gpu: str
    tactics: Mapping[str, Tactic] = field(default_factory=dict)
    overlap: bool | int = False
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    flow: Flow = "chained"
    ahead: bool = False
    programs: int | None = None
    predicted: bool = False

    @property
    def kept(self) -> frozenset[str]:
        """Keys whose default nothing beat."""
        return frozenset(self.measured) - frozenset(self.tactics)

    @property
    def origin(self) -> str:
        """In words: where its tactics come from."""
        if self.predicted:
            return f"predicted for {self.gpu}"
        return f"measured on {self.gpu}" if self.tactics or self.measured else "stated defaults"


def gpu_name(device: torch.device) -> str:
    """`nvidia-h200`: what the table of this device is called; empty without a GPU."""
    if device.type != "cuda":
        return ""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def tactics_for(device: torch.device) -> TacticTable:
    """The user's own table for this GPU (in XR0_CACHE/tactics), else the package's, measured on one of its kind, else
    that predicted for its compute capability, else an empty one: defaults. A CPU that emulates a chip has the predicted
    one.

    Raises ValueError for a table that cannot be read.
    """
    name, shipped = gpu_name(device), Path(str(resources.files("xr0_engine"))) / "tactics"
    paths = [folder / f"{name}.json" for folder in (own_folder(), shipped)] if name else []
    if arch := capability(device):
        paths.append(predicted_path(shipped, arch))
    for path in paths:
        if path.is_file():
            return read_tactics(path)
    return stated_defaults(device)


def stated_defaults(device: torch.device) -> TacticTable:
    """No tactics: what runs where there is no table."""
    return TacticTable(gpu=gpu_name(device))


def predicted_path(folder: Path, arch: int) -> Path:
    """Where the table predicted for a compute capability lies in a folder of tables."""
    return folder / "predicted" / f"sm_{arch}.json"


def own_folder() -> Path:
    return cache_dir() / "tactics"


def read_tactics(path: Path) -> TacticTable:
    """Raises ValueError that names the file for anything but a table of this schema."""
    data = read_bytes(path, FileError)
    with reading(f"{path} is no tactic table", FileError, "; `xr0 bench tune` makes one"):
        content = parse_json(data)
        if whole(content, "schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {content['schema']}")
        known = {part.name for part in fields(TacticTable)} | {"schema"}
        if unknown := content.keys() - known:
            raise ValueError(f"unknown {sorted(unknown)!r:.80}")
        table = TacticTable(
            gpu=text(content, "gpu"),
            tactics={key: _tactic(key, value) for key, value in section(content, "tactics").items()},
            overlap=content.get("overlap", False),
            measured=section(content, "measured"),
            environment=section(content, "environment"),
            flow=content.get("flow", "chained"),
            ahead=content.get("ahead", False),
            programs=content.get("programs"),
            predicted=flag(content, "predicted", False),
        )
        if table.flow not in get_args(Flow):
            raise ValueError(f"flow: expected {' or '.join(get_args(Flow))}, got {table.flow!r:.80}")
        if table.programs is not None and not (type(table.programs) is int and 1 <= table.programs <= LARGEST):
            raise ValueError(f"programs: expected a number of at least 1 or null, got {table.programs!r:.80}")
        if not isinstance(table.ahead, bool):
            raise ValueError(f"ahead: expected true or false, got {table.ahead!r:.80}")
        if not (isinstance(table.overlap, int) and 0 <= table.overlap <= LARGEST):
            raise ValueError(f"overlap: expected true, false or a number of layers, got {table.overlap!r:.80}")
        for key in table.measured:
            times = section(table.measured, key)
            for candidate in times:
                number(times, candidate, least=0)
        return table


def _tactic(key: str, value: Any) -> Tactic:
    """One of a table. Raises ValueError or TypeError that names key and field."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} is {value!r:.80}, not an object")
    known = {part.name: part.default for part in fields(Tactic)}
    if unknown := value.keys() - known.keys():
        raise ValueError(f"{key}: unknown {sorted(unknown)!r:.80}")
    for name, given in value.items():
        if name == "schedule":
            if given not in get_args(Schedule):
                raise ValueError(f"{key}: schedule: expected one of {', '.join(get_args(Schedule))}, got {given!r:.80}")
        elif isinstance(known[name], bool):
            flag(value, name)
        else:
            whole(value, name, None, 0, LARGEST)
    return Tactic(**value)


def write_tactics(table: TacticTable, path: Path) -> None:
    """The file appears whole or not at all."""
    content = {"schema": SCHEMA, **asdict(table)}
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
