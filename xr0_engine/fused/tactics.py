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
from xr0_engine.files import write_whole
from xr0_engine.fused.backends import capability
from xr0_engine.fused.ops import Flow, Tactic

SCHEMA = 1


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
    return TacticTable(gpu=name)


def predicted_path(folder: Path, arch: int) -> Path:
    """Where the table predicted for a compute capability lies in a folder of tables."""
    return folder / "predicted" / f"sm_{arch}.json"


def own_folder() -> Path:
    return cache_dir() / "tactics"


def read_tactics(path: Path) -> TacticTable:
    """Raises ValueError that names the file for anything but a table of this schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}")
        known = {part.name for part in fields(Tactic)}
        for key, value in content["tactics"].items():
            if unknown := set(value) - known:
                raise ValueError(f"{key}: unknown {sorted(unknown)}")
        tactics = {key: Tactic(**value) for key, value in content.pop("tactics").items()}
        table = TacticTable(tactics=tactics, **content)
        if table.flow not in get_args(Flow):
            raise ValueError(f"flow: expected {' or '.join(get_args(Flow))}, got {table.flow!r}")
        if table.programs is not None and (not isinstance(table.programs, int) or table.programs < 1):
            raise ValueError(f"programs: expected a number of at least 1 or null, got {table.programs!r}")
        if not isinstance(table.ahead, bool):
            raise ValueError(f"ahead: expected true or false, got {table.ahead!r}")
        if not isinstance(table.overlap, int) or table.overlap < 0:
            raise ValueError(f"overlap: expected true, false or a number of layers, got {table.overlap!r}")
        return table
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tactic table: {error}; `xr0 bench tune` makes one") from None


def write_tactics(table: TacticTable, path: Path) -> None:
    """The file appears whole or not at all."""
    content = {"schema": SCHEMA, **asdict(table)}
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
