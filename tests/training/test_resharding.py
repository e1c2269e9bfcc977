"""A checkpoint of some processes is whole for any other number of them, whatever part of the model is trained."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from tests.training.support import FORKED, Numbered, config_for, robot_sample, statistics, train
from xr0_engine.training.checkpoint import checkpoints
from xr0_engine.training.distributed import world
from xr0_engine.training.trainer import Trainer

STEPS = 2
# The head alone is split, and the VLM is whole in every process; with it its adapters; or both are split.
RECIPES = {
    "finetune_head": (),
    "lora": (),
    "post_train_async": (),
    "post_train_sync": ("optim.moments=8bit",),
}
"""Recipe -> what is changed of it."""
SAVED_BY, OPENED_BY = 2, 3
"""Processes: no tensor has as many rows that three of them get equal shards."""


def config_of(recipe, base):
    short = (f"optim.steps={STEPS}", "optim.warmup_steps=1", f"run.checkpoint_every={STEPS}")
    return config_for(
        recipe, base, *short, "data.batch_size=1", "flow.repeat=1", "optim.accumulate=1", *RECIPES[recipe]
    )


def opened(recipe, base, folder):
    """Name -> whole tensor, as a run has them that goes on from its checkpoint."""
    with world() as here:
        source = Numbered(robot_sample, 1, here.rank, here.size)
        trainer = Trainer(config_of(recipe, base), folder, here, source, None, statistics())
        assert (trainer.step, source.number) == (STEPS, STEPS)
        state = trainer.checkpointer._state()
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            for name, value in state.items()
        }


def one_of_three(base, folders, rank, ports):
    def place(size, port):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})

    for recipe, folder in folders.items():
        if rank < SAVED_BY:
            place(SAVED_BY, ports.pop())
            # The last step is validated before it is saved: what that gathers must not get into the checkpoint.
            train(config_of(recipe, base), folder, validation=lambda: [robot_sample(number) for number in range(2)])
        else:
            ports.pop()
        place(OPENED_BY, ports.pop())
        torch.save(opened(recipe, base, folder), folder / f"opened.{rank}")


def stored(checkpoint):
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return state


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Recipe -> a run of two processes, which three have opened."""
    made = {recipe: tmp_path_factory.mktemp(recipe) for recipe in RECIPES}
    sockets = [socket.socket() for _ in range(2 * len(RECIPES))]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    processes = [FORKED.Process(target=one_of_three, args=(base, made, rank, ports)) for rank in range(OPENED_BY)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0] * OPENED_BY
    finally:
        for process in processes:
            process.kill()
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_more_and_fewer_processes_open_what_two_have_saved(recipe, folders, base):
    folder = folders[recipe]
    (checkpoint,) = checkpoints(folder / "checkpoints")
    expected = stored(checkpoint)
    counts = [value for name, value in expected.items() if name.endswith(".step")]
    second = (".exp_avg_sq", ".exp_avg_root", ".exp_avg_root.codes")
    moments = [value for name, value in expected.items() if name.endswith(second)]
    assert len(counts) == len(moments) == sum(name.startswith("model.") for name in expected)
    assert any(name.endswith(".codes") for name in expected) == ("optim.moments=8bit" in RECIPES[recipe])
    assert all(value == STEPS for value in counts)
    assert any(bool(value.any()) for value in moments)
    assert any(name.startswith("model.vlm") for name in expected) == (recipe != "finetune_head")
    found = [torch.load(folder / f"opened.{rank}", weights_only=True) for rank in range(OPENED_BY)]
    for state in (*found, opened(recipe, base, folder)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
