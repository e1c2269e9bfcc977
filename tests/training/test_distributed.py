"""Two processes over gloo are one process with twice the micro-batches."""

from __future__ import annotations

import filecmp
import os
import socket

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.training.driving import KEPT
from tests.training.support import FORKED, config_for, metrics, robot_sample, train
from xr0_engine.training.checkpoint import checkpoints

SAME_PARAMETERS = 1e-5
"""After 20 steps at the published learning rate, which move a parameter by up to 2e-3: the sums over both halves of a
batch come in another order, and Adam divides by small roots."""


def twenty_steps(base, folder, accumulate, *more):
    published = ("optim.peak_lr=1e-4", "optim.min_lr=5e-7", "optim.weight_decay=0.1")
    short = ("optim.steps=20", "optim.warmup_steps=2", "run.checkpoint_every=20", "data.batch_size=2", "flow.repeat=1")
    config = config_for("post_train_async", base, *published, *short, f"optim.accumulate={accumulate}", *more)
    # Validation ends with the step that is saved: what it gathers must not get into the checkpoint.
    train(config, folder, validation=lambda: [robot_sample(number) for number in range(4)])


def one_of_two(base, folder, rank, port):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    KEPT[:] = [folder, folder / "kept"]
    driven = ("run.closed_loop=tests.training.driving:kept", "run.closed_loop_every=20")
    twenty_steps(base, folder, 1, *driven)


def trained(folder):
    (checkpoint,) = checkpoints(folder / "checkpoints")
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size)
        for name, entry in entries.items()
        if name.startswith("model.") or name.endswith(".step")
    }
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return state


def test_two_processes_give_the_parameters_of_one(base, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKED.Process(target=one_of_two, args=(base, together, rank, port)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        twenty_steps(base, alone, accumulate=2)
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected, actual = trained(alone), trained(together)
    assert expected.keys() == actual.keys()
    assert {float(value) for name, value in actual.items() if name.endswith(".step")} == {20}
    assert max(float((expected[name] - actual[name]).abs().max()) for name in expected) < SAME_PARAMETERS
    begun = load_file(base / "model-00001-of-00001.safetensors")["sink.weight"].float()
    assert (expected["model.head.sink.weight"] - begun).abs().max() > 20 * SAME_PARAMETERS
    # What drove after the last step had the shards of both.
    names = sorted(path.name for path in (together / "model").iterdir())
    assert filecmp.cmpfiles(together / "model", together / "kept", names, shallow=False) == (names, [], [])
    steps = [line["step"] for line in metrics(together) if "closed_loop/kept" in line]
    assert steps == [0, 20]
