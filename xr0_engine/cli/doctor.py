"""`xr0 doctor`: what this machine can run, and what to do about the rest."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from xr0_engine import __version__
from xr0_engine.cli import install_hint
from xr0_engine.env import emulated_arch

REQUIRED = ("numpy", "pillow", "tokenizers", "safetensors")
OPTIONAL = {
    "torch": "to run the model",
    "triton": "for the GPU kernels",
    "huggingface_hub": "to download checkpoints",
    "matplotlib": "for plots",
    "av": "for videos",
    "gym_aloha": "for the simulated robot of `xr0 demo`",
}
"""Package that an extra installs -> what it is good for."""


@dataclass(frozen=True)
class Auto:
    """What backend `auto` is on one device. runs: in words. verdicts: of the self-checks that it goes by, oldest first:
    what was checked, outcome, stage and reason if it did not pass, day, file."""

    device: str
    runs: str
    verdicts: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What doctor found.

    ready: whether the model can run here at all. versions: package -> version, None if not installed.
    gpus: the CUDA GPUs that torch can use. auto: what an engine runs that is not told, for each of them. backends,
    native (the module _C), native_cuda (its part for GPUs) and rendering (MuJoCo without a display): None if it works,
    else why not. instruction_sets: what _C uses on this CPU, fastest first. remedies: missing part -> what to do.
    """

    ready: bool
    versions: dict[str, str | None]
    gpus: list[str]
    auto: list[Auto]
    backends: dict[str, str | None]
    native: str | None
    native_cuda: str | None
    instruction_sets: list[str]
    rendering: str | None
    remedies: dict[str, str]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for scripts.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run the GPU kernels' self-check now, whatever it found before.")
    ] = False,
) -> None:
    """Check this machine: versions, GPUs, what can run the model, and how to get what is missing.

    Exit code 0 if the model can run here, 1 if it cannot, or if the kernels fail --check.
    """
    if check:
        _check_kernels()
    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    failed = check and any(verdict["outcome"] == "failed" for auto in report.auto for verdict in auto.verdicts)
    raise typer.Exit(0 if report.ready and not failed else 1)


def examine() -> Report:
    """Look at this machine. Tries out rendering in short-lived processes; computes nothing on a GPU."""
    versions = {package: _version(package) for package in (*REQUIRED, *OPTIONAL)}
    gpus, backends = _compute(has_torch=versions["torch"] is not None)
    native, native_cuda, instruction_sets = _native(has_torch=versions["torch"] is not None)
    rendering = _rendering(has_simulator=versions["gym_aloha"] is not None)

    remedies = {
        package: f"{purpose}: {install_hint(package)}"
        for package, purpose in OPTIONAL.items()
        if versions[package] is None and (package != "triton" or gpus)
    }
    if native:
        remedies["native module"] = "apt-get install g++ python3-dev, then install xr0-engine from source again"
    elif native_cuda and gpus:
        remedies["native CUDA part"] = "install xr0-engine from source again, with nvcc on PATH and XR0_BUILD_CUDA=1"
    if rendering and versions["gym_aloha"]:
        remedies["rendering"] = "apt-get install libegl1 libgl1, or libosmesa6"
    if versions["torch"] and not gpus and Path("/proc/driver/nvidia/version").exists():
        remedies["GPU"] = "this torch cannot use the NVIDIA driver: install a CUDA build of torch that fits the driver"
    return Report(
        ready=backends["reference"] is None,
        versions={"xr0-engine": __version__, "python": platform.python_version(), **versions},
        gpus=gpus,
        auto=_auto() if versions["torch"] is not None else [],
        backends=backends,
        native=native,
        native_cuda=native_cuda,
        instruction_sets=instruction_sets,
        rendering=rendering,
        remedies=remedies,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compute(has_torch: bool) -> tuple[list[str], dict[str, str | None]]:
    if not has_torch:
        return [], {"reference": "torch is not installed"}
    import torch

    from xr0_engine.backend import backend_status
    from xr0_engine.fused.tactics import tactics_for

    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory, origin = f"{gpu.total_memory / 2**30:.0f} GiB", tactics_for(torch.device("cuda", index)).origin
        gpus.append(f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}; tactics: {origin}")
    return gpus, backend_status()


def _check_kernels() -> None:
    """Raises NotImplementedError where kernels cannot run."""
    from xr0_engine.backend import interpreted, kernel_devices, triton_fault
    from xr0_engine.fused.choice import Checked, check_now
    from xr0_engine.fused.tactics import tactics_for
    from xr0_engine.fused.verdict import forget, machine_of

    if fault := triton_fault():
        raise NotImplementedError(f"--check: {fault}")
    for device in kernel_devices():
        # What was found of checkpoints goes too: their next use checks them again.
        forget(machine_of(device))
        # The interpreter's products are wrong on bfloat16.
        check_now(device, "float32" if interpreted() else "bfloat16", tactics_for(device), Checked())


def _auto() -> list[Auto]:
    from xr0_engine.backend import auto_checks, kernel_devices, triton_fault
    from xr0_engine.fused.verdict import machine_of, verdict_path, verdicts_on

    found, devices = [], kernel_devices()
    if not devices:
        return [Auto("cpu", "reference: there is no GPU")]
    if fault := triton_fault():
        return [Auto(str(device), f"reference: {fault}") for device in devices]
    for device in devices:
        verdicts = verdicts_on(machine_of(device))
        failed = [verdict for verdict in verdicts if verdict.outcome != "passed"]
        told = "; ".join(verdict.told() for verdict in failed or verdicts)
        runs = f"{'reference' if failed else 'triton'}: self-check of {told}"
        if not verdicts:
            runs = "triton, if it passes its self-check, which the first use makes, or `xr0 doctor --check` now"
        if not auto_checks(device):
            runs = "reference: there is no GPU" + (f"; self-check of {told}" if told else "")
        rows = [
            {
                "checked": verdict.subject,
                "outcome": verdict.outcome,
                "stage": verdict.stage,
                "reason": verdict.reason,
                "created": verdict.created,
                "file": str(verdict_path(verdict.identity)),
            }
            for verdict in verdicts
        ]
        found.append(Auto(str(device), runs, rows))
    return found


def _native(has_torch: bool) -> tuple[str | None, str | None, list[str]]:
    if find_spec("xr0_engine._C") is None:
        missing = "not built at installation"
        return f"{missing}; Pillow and NumPy do its work, only slower", missing, []
    if not has_torch:
        return None, "torch is not installed", []
    from xr0_engine.robot import patches

    return None, patches.native_cuda_fault(), patches.instruction_sets()


def _rendering(has_simulator: bool) -> str | None:
    if not has_simulator:
        return "the simulator is not installed"
    from xr0_engine.sim import choose_renderer

    try:
        choose_renderer()
    except RuntimeError as error:
        return str(error)
    return None


def _ready(backend: str) -> str:
    arch = emulated_arch() if backend == "triton" else None
    return "ready" if arch is None else f"ready: emulated sm_{arch}, on the CPU"


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [(name, version or "not installed", version is not None) for name, version in report.versions.items()]
    rows += [("GPU", gpu, True) for gpu in report.gpus] or [("GPU", "none that torch can use", False)]
    rows += [
        (f"auto on {auto.device}", auto.runs, all(verdict["outcome"] != "failed" for verdict in auto.verdicts))
        for auto in report.auto
    ]
    rows += [(f"backend {name}", reason or _ready(name), reason is None) for name, reason in report.backends.items()]
    sets = f"ready: {', '.join(report.instruction_sets)}" if report.instruction_sets else "ready"
    rows += [("native module", report.native or sets, report.native is None)]
    rows += [("native CUDA part", report.native_cuda or "ready", report.native_cuda is None)]
    rows += [("rendering", report.rendering or "ready", report.rendering is None)]
    table = Table("part", "state", box=None)
    for part, state, good in rows:
        table.add_row(part, state, style=None if good else "yellow")
    console = Console(markup=False)
    console.print(table)
    console.print("\nThe model can run here." if report.ready else "\nThe model cannot run here.")
    if report.remedies:
        remedies = Table("missing", "what to do", box=None)
        for part, remedy in report.remedies.items():
            remedies.add_row(part, remedy)
        console.print(remedies)
