"""What is run where: the plan of a GPU and of an emulator, sizes that fit, commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from tests.bench.machine.support import facts
from tests.support import ROOT
from xr0_engine.bench.machine.facts import OPTIONAL
from xr0_engine.bench.machine.plan import GIB, PARTS, Step, Wish, choose_size, parts_of, plan
from xr0_engine.cli import app

OUT = Path("/nowhere/out")
GPU, EMULATED = facts(), facts(emulated=90, native_cuda_fault="no driver", sanitizer=False)


def steps(given=GPU, size="4b", **wish):
    return {step.name: step for step in plan(given, Wish(emulate=given["emulated"], **wish), size, OUT)}


def test_parts_come_in_order_of_worth_and_each_has_steps():
    made = list(steps().values())
    assert list(parts_of(made)) == list(PARTS)
    assert [step.part for step in made] == sorted((step.part for step in made), key=list(PARTS).index)
    assert len({step.name for step in made}) == len(made)
    assert len({step.file for step in made if step.file}) == len([step for step in made if step.file])


@pytest.mark.parametrize("given", [GPU, EMULATED], ids=["GPU", "emulated"])
def test_every_command_exists_with_its_options(given, tmp_path):
    """Read as `xr0` would read it; nothing is run."""
    for step in steps(given, "tiny", golden=tmp_path).values():
        assert step.arguments[:2] == ("-m", "xr0_engine"), step.name
        words = [word.replace("{minutes}", "1.5") for word in step.arguments[2:]]
        command, context = typer.main.get_command(app), None
        while hasattr(command, "commands") or hasattr(command, "list_commands"):
            context = command.make_context("xr0", [], parent=context, resilient_parsing=True)
            name = words.pop(0)
            command = command.get_command(context, name)
            assert command is not None, (step.name, name)
        command.make_context(step.name, words, parent=context)


def test_on_a_gpu_with_everything_nothing_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("xr0_engine.bench.machine.plan.sanitizer", lambda: "/usr/bin/compute-sanitizer")
    made = steps(golden=tmp_path)
    assert {name: step.left_out for name, step in made.items() if step.left_out} == {}
    wrapper = made["sanitizer-racecheck"].wrapper
    assert wrapper[:3] == ("/usr/bin/compute-sanitizer", "--tool", "racecheck")
    assert made["tune"].copied[1] == OUT / "tactics.json"
    assert made["tune"].copied[0].name == "nvidia-h200.json"


def test_what_a_cpu_cannot_do_is_left_out_with_its_reason():
    made = steps(EMULATED, "tiny")
    run = [name for name, step in made.items() if not step.left_out]
    assert run == [
        "doctor",
        "self-check",
        "tune",
        "latency-libero-infer",
        "latency-bimanual-infer",
        "bound-libero",
        "kernels-libero",
        "released-libero",
        "throughput-libero",
        "memory-reference",
        "finetune-libero",
    ]
    assert made["latency-libero-replay"].left_out == "CUDA graphs need a GPU"
    assert "--golden" in made["golden-chained"].left_out
    assert all("cuda" not in step.arguments for step in made.values())
    assert Wish(emulate=90).environment()["XR0_EMULATE"] == "90"
    assert Wish().environment()["XR0_EMULATE"] == ""


@pytest.mark.parametrize(
    ("device", "seen", "chosen"),
    [("auto", None, None), ("cuda", "2,3", None), ("cuda:1", None, "1"), ("cuda:1", "2,3", "3"), ("cuda:0", "5", "5")],
)
def test_steps_see_the_chosen_gpu_alone(device, seen, chosen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert Wish(device).environment().get("CUDA_VISIBLE_DEVICES") == chosen


def test_gpu_that_is_hidden_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES shows 2 GPUs, got 'cuda:2'"):
        Wish("cuda:2").environment()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("images", {"native_cuda_fault": "built without nvcc"}, "built without nvcc"),
        ("released-libero", {"optional": {**dict.fromkeys(OPTIONAL, True), "transformers": False}}, "transformers not"),
        (
            "finetune-libero",
            {"optional": dict.fromkeys(OPTIONAL, False)},
            "transformers and huggingface_hub and tensor",
        ),
    ],
)
def test_what_is_not_installed_is_named(name, changes, reason):
    assert reason in steps(facts(**changes))[name].left_out


def test_only_some_parts():
    made = steps(only=("latency",))
    assert {step.part for step in made.values() if not step.left_out} == {"latency"}
    assert made["tune"].left_out == "not asked for (--only)"
    assert [name for name, step in steps(only=("doctor", "tune")).items() if not step.left_out] == ["doctor", "tune"]
    with pytest.raises(ValueError, match=r"--only: expected some of machine, correct.*; got magic"):
        steps(only=("latency", "magic"))


def test_checkpoint_is_made_once():
    assert "checkpoint" not in steps()
    assert "checkpoint" in steps(facts(checkpoints=[]))
    assert "checkpoint" not in steps(facts(checkpoints=[]), "small")
    made = steps(facts(checkpoints=[]), only=("latency",))
    assert made["checkpoint"].left_out is None
    assert made["latency-libero-replay"].needs == "checkpoint"
    assert made["graphs"].needs is made["checkpoint"].needs is None


@pytest.mark.parametrize(
    ("changes", "wish", "size", "reason"),
    [
        ({}, {}, "4b", None),
        ({"gpu": {**GPU["gpu"], "memory_bytes": 12 * GIB}}, {}, "small", "the GPU has 12 GiB, and 14 are needed"),
        ({"checkpoints": [], "disk_free_bytes": 3 * GIB}, {}, "small", "XR0_CACHE has 3.0 GiB free, and 10 are needed"),
        ({"disk_free_bytes": 3 * GIB}, {}, "4b", None),
        ({"disk_free_bytes": 3 * GIB}, {"size": "tiny"}, "tiny", None),
        ({}, {"emulate": 90}, "tiny", "an emulator takes minutes for a step of the published sizes"),
    ],
    ids=["all fits", "small GPU", "full disk", "checkpoint there", "asked for", "emulated"],
)
def test_size_is_what_fits(changes, wish, size, reason):
    assert choose_size(facts(**changes), Wish(**wish)) == (size, reason)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"golden": Path("/nowhere")}, "--golden: there is no folder /nowhere"),
        ({"device": "cpu"}, "--device: expected auto, cuda or cuda:N; got 'cpu'"),
        ({"size": "huge"}, "--size: expected one of tiny, small, 4b; got 'huge'"),
        ({"emulate": 90, "size": "4b"}, "--size: the emulator is for tiny models"),
        ({"emulate": 75}, "--emulate: expected one of 80, 86, 89, 90, 120; got 75"),
    ],
)
def test_wrong_wish_is_refused(wish, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Wish(**wish).check()


@pytest.mark.parametrize(("gib", "largest"), [(24, "8"), (80, "32")])
def test_batches_are_what_fits(gib, largest):
    made = steps(facts(gpu={**GPU["gpu"], "memory_bytes": gib * GIB}))
    words = made["throughput-libero"].arguments
    assert words[words.index("--batches") + 1].split(",")[-1] == largest


@pytest.mark.parametrize(
    ("minutes", "remaining", "limit"),
    [(25, 1500, 120), (10, 600, 60), (1, 60, 20), (25, 30, 30)],
    ids=["its own limit", "its share", "what it needs", "what remains"],
)
def test_time_is_shared_out(minutes, remaining, limit):
    assert Step("a", "machine", "", ()).limit_s(minutes, remaining) == limit


def test_25_minutes_are_enough_for_every_step_to_begin():
    """If each takes what it needs at least."""
    assert sum(step.least_s for step in steps(facts(checkpoints=[])).values()) < 25 * 60


def test_docs_name_every_part():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [part for part in PARTS if f"| `{part}` |" not in text] == []
