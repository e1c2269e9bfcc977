"""The engine's latency against the released way to run the model: one run, the rivals taking turns.

Rivals: `engine`; `released`, the structure of the released code; `compiled`, the same under torch.compile; `onnx` or
`tensorrt`, the engine over an export; `guided`, the engine's call with a guide (docs/realtime.md); a recipe's name, the
engine in 8 bits (docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xr0_engine.backend import resolve_backend, resolve_dtype
from xr0_engine.bench.cases import HeadSubject, Setup, Subject
from xr0_engine.bench.measure.eight_bits import (
    agreement,
    check_agreement,
    check_recipe,
    compared,
    eight_bit_engine,
    precisions,
    weights_bytes,
)
from xr0_engine.bench.measure.replay import REPLAY_BOUNDARIES, check_graphs, engine_rival, released_rival, session_of
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.tell.tables import footer, latency_table, size
from xr0_engine.bench.timing import (
    WARM_UP,
    CallTimer,
    StageTimes,
    check_boundary,
    peak_memory_bytes,
    ratio_with_spread,
    reset_peak_memory,
    run,
)
from xr0_engine.engine import Engine
from xr0_engine.exported.model import refuse_other_model
from xr0_engine.types import Guide

PARTS = ("all", "dit")
GATE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""Relative RMS between the rivals before anything is timed; below float32 each rounds in its own places."""

Rival = tuple[Callable[[], StageTimes], Callable[[], np.ndarray]]
"""What is timed, and what gives the actions that are checked: (B, T, A), in the model's units."""


def measure(
    setup: Setup,
    rounds: int,
    command: str,
    part: str = "all",
    boundary: str | None = None,
    alone: bool = False,
    attention: str = "sdpa",
    compiled: bool = False,
    export: Path | None = None,
    export_backend: str = "auto",
    guided: bool = False,
) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did.

    part: of PARTS, the whole model or the action head alone, which needs no checkpoint. boundary: stage (the default),
    infer, replay, update+replay or websocket for the whole model, flow for the head. setup.quantize: the engine in 8
    bits joins the one in 16. alone: without the released way;
    attention: theirs; compiled: torch.compile joins them. export: a folder of `xr0 export` for the case, which joins
    them too, run by export_backend: onnx, tensorrt or auto. guided: a call drawn toward a whole chunk joins them;
    drawn nowhere it has to give the engine's actions. Raises ValueError for a wrong argument,
    NotImplementedError for what this machine or version lacks, RuntimeError if the rivals disagree: nothing is timed
    then.
    """
    if setup.quantize is not None and (part == "dit" or boundary not in (None, "stage", "infer")):
        raise ValueError("quantize: expected part all, boundary stage or infer")
    if guided and (part == "dit" or boundary not in (None, "stage", "infer") or setup.case.prefix_length):
        raise ValueError("guided: expected part all, boundary stage or infer, and a case without a prefix")
    _check(part, rounds, alone, attention != "sdpa" or compiled, export, export_backend, boundary)
    if boundary == "websocket" and part == "all":
        # Only it needs the server's packages.
        from xr0_engine.bench.measure import websocket

        return websocket.measure(setup, rounds, command, alone)
    boundary = check_boundary(boundary or ("flow" if part == "dit" else "stage"), _boundaries(part))
    if boundary in REPLAY_BOUNDARIES:
        check_graphs(setup, f"boundary {boundary!r}")
    if setup.case.family != "xr0" and not alone:
        raise ValueError(
            f"case {setup.case.name}: the released way that is measured beside the engine is Xiaomi-Robotics-0's; take "
            "--alone"
        )
    variants = {} if alone else {"released": False} | ({"compiled": True} if compiled else {})
    told: dict[str, Any] = {}
    if part == "dit":
        head_subject = HeadSubject.make(setup)
        device, case, backend = head_subject.state.device, head_subject.describe(), resolve_backend("auto")
        rivals = _head_rivals(head_subject, attention, variants)
    else:
        check_recipe(setup, alone)
        subject = Subject.load(replace(setup, quantize=None))
        device, case, backend = subject.engine.model.device, subject.describe(), subject.engine.backend
        rivals = _model_rivals(subject, boundary, attention, variants, export, export_backend, guided)
        told |= {"precision": precisions(subject, setup.quantize)}
        told |= {"weights_bytes": {"engine": weights_bytes(subject.plain_model())}}
        if (found := compared(subject.folder)) is not None:
            told |= {"compared": found}
        if setup.quantize is not None:
            eight = eight_bit_engine(subject, setup.quantize)
            rivals[setup.quantize] = _engine_rival(subject, eight, boundary)
            told["weights_bytes"][setup.quantize] = weights_bytes(replace(subject, engine=eight).plain_model())
    errors, apart = _gate(rivals, setup.dtype, setup.quantize)
    told |= {"agreement": apart} if apart else {}

    reset_peak_memory(device)
    series, reason = run({name: timed for name, (timed, _) in rivals.items()}, rounds, WARM_UP)
    result = Result(
        kind="latency",
        command=command,
        environment=environment(device),
        case=case,
        boundary=boundary,
        backend=backend,
        series=series,
        facts={
            "part": part,
            "attention": attention,
            "warm_up": WARM_UP,
            # Rivals share a process: what they hold counts together.
            "peak_memory_bytes": peak_memory_bytes(device),
            "error_against_engine": errors,
            **told,
        },
        complete=reason is None,
    )
    return result, reason


def _check(
    part: str, rounds: int, alone: bool, of_rivals: bool, export: Path | None, export_backend: str, boundary: str | None
) -> None:
    """Raises ValueError for options that do not go together. of_rivals: whether there are any that only rivals have."""
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}; got {part!r}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if boundary == "websocket" and part == "all" and (of_rivals or export is not None):
        raise ValueError("boundary websocket: expected no options of the rivals beside it")
    if alone and of_rivals:
        raise ValueError("alone: expected no options of the rivals (compile, attention) beside it")
    if export is not None and part == "dit":
        raise ValueError("export: expected none beside part dit: an export is measured as a whole")
    if export is None and export_backend != "auto":
        raise ValueError(f"export-backend: expected an export beside it, got {export_backend!r} alone")
    if export is not None and boundary in REPLAY_BOUNDARIES:
        raise ValueError(f"export: expected none beside boundary {boundary}: it has graphs of its own")


def _boundaries(part: str) -> tuple[str, ...]:
    return ("flow",) if part == "dit" else ("stage", "infer", *REPLAY_BOUNDARIES, "websocket")


def _model_rivals(
    subject: Subject,
    boundary: str,
    attention: str,
    variants: dict[str, bool],
    export: Path | None,
    export_backend: str,
    guided: bool,
) -> dict[str, Rival]:
    engine, setup = subject.engine, subject.setup
    profile, statistics = engine.embodiment(setup.case.robot_type), engine.statistics[setup.case.robot_type]
    rival, replays = partial(_rival, boundary), boundary in REPLAY_BOUNDARIES
    ours = engine_rival(*session_of(subject), boundary) if replays else _engine_rival(subject, engine, boundary)
    rivals = {"engine": ours}
    if export is not None:
        exported = Engine.from_export(export, setup.device, export_backend, setup.case.profile)
        refuse_other_model(exported.config, engine.config)
        rivals[exported.backend] = _engine_rival(subject, exported, boundary)
    if guided:
        rivals["guided"] = _guided_rival(subject, lambda call: rival(call)[0])
    for name, compiled in variants.items():
        # Only the rivals need transformers.
        from xr0_engine.bench.measure.baseline import ReleasedModel

        head, dtype = subject.plain_model().head, resolve_dtype(setup.dtype)
        model = ReleasedModel(subject.folder, engine.config, head, dtype, attention, compiled)
        inputs = (subject.observations, profile, statistics, subject.noise, subject.prefixes)
        rivals[name] = released_rival(model, subject, boundary) if replays else rival(partial(model.infer, *inputs))
    return rivals


def _rival(boundary: str, call: Callable[[], tuple[np.ndarray, StageTimes]]) -> Rival:
    # The calls end with the actions on the host, so the wall clock is right on a GPU too.
    timer = CallTimer(torch.device("cpu"))
    timed = (lambda: call()[1]) if boundary == "stage" else (lambda: {"total": timer(call)})
    return timed, lambda: call()[0]


def _engine_rival(subject: Subject, engine: Engine, boundary: str) -> Rival:
    """An engine of the same model, with the subject's inputs."""

    def call() -> tuple[np.ndarray, StageTimes]:
        chunks = engine.infer(subject.observations, subject.prefixes, subject.noise)
        return np.stack([chunk.normalized for chunk in chunks]), chunks[0].timing_ms

    return _rival(boundary, call)


def _guided_rival(
    subject: Subject, timed: Callable[[Callable[[], tuple[np.ndarray, StageTimes]]], Callable[[], StageTimes]]
) -> Rival:
    """The engine's call with a guide as long as a chunk; what is checked is the call with an empty one."""
    actions = np.stack([chunk.actions for chunk in subject.infer()])

    def call(length: int) -> tuple[np.ndarray, StageTimes]:
        guides = [Guide(own[:length], length // 2) for own in actions]
        chunks = subject.engine.infer(subject.observations, None, subject.noise, guide=guides)
        return np.stack([chunk.normalized for chunk in chunks]), chunks[0].timing_ms

    return timed(partial(call, actions.shape[1])), lambda: call(0)[0]


def _head_rivals(subject: HeadSubject, attention: str, variants: dict[str, bool]) -> dict[str, Rival]:
    timer = CallTimer(subject.state.device)
    kv, dtype = subject.kv, subject.head.sink.weight.dtype
    cache = list(zip(kv.keys, kv.values, strict=True))

    def rival(sample: Callable[[], Tensor]) -> Rival:
        return (lambda: {"total": timer(sample)}), (lambda: sample().cpu().numpy())

    rivals = {"engine": rival(subject.sample)}
    for name, compiled in variants.items():
        # Only the rivals need transformers.
        from xr0_engine.bench.measure.baseline import ReleasedHead

        head = ReleasedHead(subject.head, attention, compiled)
        inputs = (kv.next_position, kv.mask, subject.state.to(dtype), subject.noise, kv.action_mask)
        rivals[name] = rival(partial(head.sample, cache, *inputs, subject.prefix, subject.prefix_length))
    return rivals


def _gate(
    rivals: dict[str, Rival], dtype: str, recipe: str | None = None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Each rival's error against the engine, and the agreement of the one in 8 bits, which is named after its recipe.
    What computes something else is not compared: RuntimeError."""
    ours = rivals["engine"][1]()
    errors, apart = {}, {}
    for name in [name for name in rivals if name != "engine"]:
        try:
            theirs = rivals[name][1]()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"torch.compile does not work here, leave it out: {reason}") from None
        errors[name] = relative_rms(ours, theirs)
        if name == recipe:
            apart[name] = agreement(theirs, ours)
            check_agreement(name, apart[name])
        elif not errors[name] < GATE[dtype]:
            raise RuntimeError(
                f"nothing was timed: engine and {name} differ by {errors[name]:.1e}, more than {GATE[dtype]:.0e}"
            )
    return errors, apart


def relative_rms(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def show(result: Result) -> None:
    """Tables of 80 columns."""
    console = Console()
    console.print(latency_table(result))
    rivals = [name for name in result.series if name != "engine"]
    if rivals:
        console.print(_ratio_table(result, rivals))
    if "agreement" in result.facts:
        console.print(_rival_table(result))
    console.print(footer(result), markup=False, highlight=False)


def _rival_table(result: Result) -> Table:
    """What the rivals' weights take, and how far the one in 8 bits is from the engine."""
    facts, table = result.facts, Table("", box=None)
    for column in ("weights", "cosine with engine's chunk", "largest difference"):
        table.add_column(column, justify="right")
    for name, count in facts["weights_bytes"].items():
        apart = facts.get("agreement", {}).get(name)
        cells = ("", "") if apart is None else (f"{apart['cosine']:.6f}", f"{apart['largest_difference']:.4f}")
        table.add_row(name, size(count), *cells)
    return table


def _ratio_table(result: Result, rivals: list[str]) -> Table:
    table = Table(title="time over engine's", box=None)
    table.add_column("stage")
    for rival in rivals:
        table.add_column(rival, justify="right")
        table.add_column("quartiles", justify="right")
    for stage, samples in result.series["engine"].items():
        # One CUDA graph has one `step` where the rivals have stages: the total is what both have.
        if any(stage not in result.series[rival] for rival in rivals):
            continue
        row = []
        for rival in rivals:
            middle, low, high = ratio_with_spread(np.array(result.series[rival][stage]), np.array(samples))
            row += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(stage, *row)
    return table
