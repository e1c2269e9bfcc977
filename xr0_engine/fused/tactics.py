"""Tactic tables: which kernel variant runs for which shape, as measured on one kind of GPU (`xr0 bench tune`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from xr0_engine.env import cache_dir
from xr0_engine.files import write_whole
from xr0_engine.fused.ops import Tactic

SCHEMA = 1
Flow = Literal["chained", "persistent"]
"""All steps of the flow as a chain of kernels, or as one kernel."""


@dataclass(frozen=True)
class TacticTable:
    """What was measured on one kind of GPU.

    tactics: key (ops.tactic_key) -> tactic. overlap: the flow's first step runs beside the VLM's last layers; its
    kernels are chained then. flow: how it runs otherwise.
    measured: key -> {candidate: microseconds}, winner first. environment: versions, driver, commit.
    """

    gpu: str
    tactics: Mapping[str, Tactic] = field(default_factory=dict)
    overlap: bool = False
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    flow: Flow = "chained"


def gpu_name(device: torch.device) -> str:
    """`nvidia-h200`: what the table of this device is called; empty without a GPU."""
    if device.type != "cuda":
        return ""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def tactics_for(device: torch.device) -> TacticTable:
    """The user's own table for this GPU (in XR0_CACHE/tactics), else the package's, else an empty one: defaults.

    Raises ValueError for a table that cannot be read.
    """
    name = gpu_name(device)
    if not name:
        return TacticTable(gpu="")
    for folder in (own_folder(), Path(str(resources.files("xr0_engine"))) / "tactics"):
        path = folder / f"{name}.json"
        if path.is_file():
            return read_tactics(path)
    return TacticTable(gpu=name)


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
        return table
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tactic table: {error}; `xr0 bench tune` makes one") from None


def write_tactics(table: TacticTable, path: Path) -> None:
    """The file appears whole or not at all."""
    content = {"schema": SCHEMA, **asdict(table)}
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
