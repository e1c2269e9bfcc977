"""Launches in the emulator: what reaches the kernel, what is raised and where it points, what overlaps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support import ROOT
from xr0_engine.backend import backend_status, resolve_backend
from xr0_engine.cli import app
from xr0_engine.env import emulated_arch
from xr0_engine.fused import ops

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tests.ptx import EmulationError, launcher, processors, stream  # noqa: E402
from tests.ptx.decoder import decode  # noqa: E402
from tests.ptx.settings import Settings  # noqa: E402
from xr0_engine.kernels import launch as launching  # noqa: E402
from xr0_engine.kernels.arguments import Workspace  # noqa: E402
from xr0_engine.kernels.device import gdc_begin  # noqa: E402
from xr0_engine.kernels.launch import launch  # noqa: E402
from xr0_engine.kernels.linear import default_tactic  # noqa: E402

CPU = torch.device("cpu")
emulated = pytest.mark.skipif(emulated_arch() is None, reason="needs XR0_EMULATE=90")
dependent = pytest.mark.skipif((emulated_arch() or 0) < 90, reason="needs XR0_EMULATE=90: a chip with dependent launch")
SIZE = 64


@triton.jit
def _copy(x, out, shift, SIZE: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, SIZE)
    value = tl.load(x + shift + place)
    tl.store(out + place, value)


@triton.jit
def _copy_too_early(x, out, SIZE: tl.constexpr, PDL: tl.constexpr):
    place = tl.arange(0, SIZE)
    value = tl.load(x + place)
    gdc_begin(PDL)
    tl.store(out + place, value)


@triton.jit
def _signal_and_write(x, SIZE: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    tl.store(x + tl.arange(0, SIZE), tl.full((SIZE,), 7.0, tl.float32))


@triton.jit
def _copy_scratch(partials, out, SIZE: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(partials + place))


@triton.jit
def _copy_from_table(addresses, out, SIZE: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, SIZE)
    x = tl.load(addresses).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(out + place, tl.load(x + place))


@triton.jit
def _disagree(out, SIZE: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, SIZE)
    tl.store(out + place // SIZE, place)


def copy(x: torch.Tensor, out: torch.Tensor, shift: int = 0, kernel=_copy) -> None:
    arguments = {"x": x, "out": out, "SIZE": SIZE}
    launch(kernel, (1,), arguments | ({"shift": shift} if kernel is _copy else {}), warps=2)


def line_of(text: str) -> str:
    """`tests/ptx/test_launcher.py:N` of the first line of this file that has the text."""
    lines = Path(__file__).read_text().splitlines()
    return f"tests/ptx/test_launcher.py:{1 + next(number for number, line in enumerate(lines) if text in line)}"


def in_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("XR0_EMULATE", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"XR0_EMULATE": "91"}, "XR0_EMULATE: expected 80, 86, 89, 90 or 120; got '91'"),
        ({"XR0_EMULATE": "sm_90"}, "XR0_EMULATE: expected 80, 86, 89, 90 or 120; got 'sm_90'"),
        ({"XR0_EMULATE": "90", "TRITON_INTERPRET": "1"}, "expected one of them, got both"),
    ],
)
def test_other_chips_and_the_interpreter_are_refused(variables, message, monkeypatch):
    done = in_new_process("import xr0_engine.kernels.launch", **variables)
    assert done.returncode == 1
    assert f"ValueError: {message}" in done.stderr or message in done.stderr.splitlines()[-1]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="XR0_EMULATE"):
        emulated_arch()


def test_outside_of_a_checkout_there_is_no_emulator(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "__file__", str(tmp_path / "site-packages" / "xr0_engine" / "kernels" / "launch.py"))
    with pytest.raises(RuntimeError, match=r"the emulator is in tests/ptx of a checkout, and .*site-packages is none"):
        launching._emulator()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEED", "-1", "XR0_EMULATE_SEED: expected a number of at least 0; got '-1'"),
        ("PROCESSORS", "0", "XR0_EMULATE_PROCESSORS: expected a number of at least 1"),
        ("ASYNC", "never", "XR0_EMULATE_ASYNC: expected one of waited, at-once, random; got 'never'"),
        ("CHECK", "races", "XR0_EMULATE_CHECK: expected one of all, bounds, none"),
    ],
)
def test_settings_that_cannot_be(name, value, message, monkeypatch):
    monkeypatch.setenv(f"XR0_EMULATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        Settings.current()


def test_settings_are_read_each_time(monkeypatch):
    monkeypatch.setenv("XR0_EMULATE_PROCESSORS", "3")
    assert processors() == 3
    monkeypatch.setenv("XR0_EMULATE_PROCESSORS", "5")
    assert processors() == 5


def test_the_backend_is_the_chips(monkeypatch):
    """With its default tactics, which the interpreter has not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("XR0_EMULATE", "90")
    assert backend_status()["triton"] is None
    assert resolve_backend("triton", CPU) == "triton"
    assert ops.has_dependent_launch(CPU)
    assert not ops.has_dependent_launch(torch.device("meta"))
    fused, shape = ops.FusedOps("triton", CPU), (208, 2560, 4096)
    assert fused.arch == 90
    assert fused.default("linear", shape) == default_tactic("linear", *shape, arch=90)
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"]).output
    assert "ready: emulated sm_90, on the CPU" in next(line for line in told.splitlines() if "backend triton" in line)


@emulated
def test_the_chip_answers_for_the_device():
    assert launching.capability(CPU) == emulated_arch()
    assert launching.processors(CPU) == processors()


@emulated
@pytest.mark.parametrize("shift", [0, 1, 16])
def test_arguments_reach_the_kernel(shift):
    """1 is compiled in, a multiple of 16 told to the compiler."""
    x, out = torch.randn(SIZE + 16), torch.full((SIZE,), torch.nan)
    copy(x, out, shift)
    assert torch.equal(out, x[shift : shift + SIZE])


@emulated
@pytest.mark.parametrize(
    ("short", "line", "kind"),
    [("x", "value = tl.load(x + shift + place)", "read"), ("out", "tl.store(out + place, value)", "write")],
)
def test_out_of_bounds_is_raised_with_the_line_of_the_source(short, line, kind):
    tensors = {"x": torch.zeros(SIZE), "out": torch.zeros(SIZE)} | {short: torch.zeros(SIZE - 4)}
    with pytest.raises(EmulationError, match=kind) as raised:
        copy(**tensors)
    assert {report.kind for report in raised.value.reports} == {"global-bounds"}
    told = str(raised.value)
    assert told.startswith(f"_copy(1,) on sm_{emulated_arch()}")
    assert line_of(line) in told


@emulated
def test_a_view_ends_at_its_last_element_though_its_memory_goes_on():
    memory = torch.zeros(2, 2 * SIZE)
    with pytest.raises(EmulationError, match="out of bounds"):
        copy(memory[0, : SIZE - 4], torch.zeros(SIZE))
    copy(memory[0, :SIZE], memory[1, SIZE:])


@emulated
def test_lanes_that_store_different_values_are_an_error():
    with pytest.raises(EmulationError) as raised:
        launch(_disagree, (1,), {"out": torch.zeros(1, dtype=torch.int32), "SIZE": 32}, warps=1)
    assert "lane-conflict" in {report.kind for report in raised.value.reports}
    assert line_of("tl.store(out + place // SIZE, place)") in str(raised.value)


@emulated
def test_scratch_memory_is_poisoned_before_each_launch():
    workspace, out = Workspace(CPU), torch.zeros(SIZE)
    for _ in range(2):
        workspace.partials(SIZE).zero_()
        out.zero_()
        launch(_copy_scratch, (1,), {"partials": workspace.partials(SIZE), "out": out, "SIZE": SIZE}, warps=2)
        assert out.isnan().all()


@emulated
def test_tensors_behind_addresses_have_to_be_told():
    x, out = torch.randn(SIZE), torch.zeros(SIZE)
    arguments = {"addresses": torch.tensor([x.data_ptr()]), "out": out, "SIZE": SIZE}
    with pytest.raises(EmulationError) as raised:
        launch(_copy_from_table, (1,), arguments, warps=2)
    assert {report.kind for report in raised.value.reports} == {"global-bounds"}
    launch(_copy_from_table, (1,), arguments, warps=2, reached=(x,))
    assert torch.equal(out, x)


@emulated
def test_launches_of_a_stream_run_in_order_and_before_pytorch_looks():
    x, middle, out = torch.randn(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    with stream() as queue:
        copy(x, middle)
        copy(middle, out)
        assert not np.asarray(out).any(), "NumPy looks at memory that PyTorch gave away: nothing has run yet"
        assert torch.equal(out, x)
        copy(x.neg(), out)
        queue.flush()
        assert np.array_equal(np.asarray(out), -x.numpy())
        copy(x, out)
    assert torch.equal(out, x)


@emulated
def test_a_stream_runs_by_windows():
    x, outs = torch.randn(SIZE), [torch.zeros(SIZE) for _ in range(3)]
    with stream(window=2):
        for out in outs:
            copy(x, out)
        assert [bool(np.asarray(out).any()) for out in outs] == [True, True, False]


@dependent
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_a_read_before_the_wait_shows_in_a_stream_alone(seed, monkeypatch):
    monkeypatch.setenv("XR0_EMULATE_SEED", seed)
    x, out = torch.zeros(SIZE), torch.zeros(SIZE)

    def both() -> None:
        launch(_signal_and_write, (1,), {"x": x, "SIZE": SIZE}, warps=2)
        copy(x, out, kernel=_copy_too_early)

    both()
    with pytest.raises(EmulationError) as raised, stream():
        both()
    assert "dependency-race" in {report.kind for report in raised.value.reports}
    assert line_of("    value = tl.load(x + place)") in str(raised.value)
    assert line_of("tl.store(x + tl.arange(0, SIZE)") in str(raised.value)


@dependent
def test_without_dependent_launch_nothing_overlaps():
    x, out = torch.zeros(SIZE), torch.zeros(SIZE)
    with launching.without_dependent_launch(), stream():
        launch(_signal_and_write, (1,), {"x": x, "SIZE": SIZE}, warps=2)
        copy(x, out, kernel=_copy_too_early)
    assert (out == 7).all()


@emulated
def test_compiled_once_for_what_the_compiler_is_told():
    x, out = torch.randn(SIZE + 64), torch.zeros(SIZE)
    copy(x, out, 32)
    known, launches = len(launcher._loaded), launcher.totals.launches
    copy(x, out, 48)
    assert len(launcher._loaded) == known
    copy(x, out, 33)
    assert len(launcher._loaded) == known + 1
    assert launcher.totals.launches == launches + 2


PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out)
.reqntid 32
{
	.reg .b64 %rd<3>;
	.file 1 "there.py"
	.loc 1 12 3
	ld.param.b64 %rd1, [out];
	st.global.b64 [%rd1], %rd1;
	ret;
}
"""


def test_decoded_programs_are_kept_by_their_text(monkeypatch, tmp_path):
    monkeypatch.setenv("XR0_EMULATE_CACHE", str(tmp_path))
    first = launcher.decoded(PTX)
    (path,) = tmp_path.glob("program-*.npz")
    monkeypatch.setattr(launcher, "decode", None)
    again = launcher.decoded(PTX)
    for name, value in vars(first).items():
        assert (
            np.array_equal(value, getattr(again, name))
            if isinstance(value, np.ndarray)
            else (value == getattr(again, name))
        ), name
    assert again.where(12) == (("there.py", 12),)
    monkeypatch.undo()
    monkeypatch.setenv("XR0_EMULATE_CACHE", str(tmp_path))
    launcher.decoded(PTX.replace("12 3", "13 3"))
    assert len(list(tmp_path.glob("program-*.npz"))) == 2
    assert path.exists()


def test_the_line_is_the_ptx_lines_own():
    program = decode(PTX)
    assert [program.where(int(line)) for line in program.records["line"]] == [(("there.py", 12),)] * 4
