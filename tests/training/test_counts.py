"""A step of many micro-batches is one batch of that size, in one process and in two, however unevenly supervised."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.support import FORKED, config_for, language_sample, metrics, robot_sample, statistics
from xr0_engine.training import trainer as trainer_module
from xr0_engine.training.batch import IGNORED, LanguageBatch, RobotBatch
from xr0_engine.training.counts import Counts, count, step_counts
from xr0_engine.training.distributed import world
from xr0_engine.training.draws import FlowDraw
from xr0_engine.training.trainer import Trainer
from xr0_engine.types import ModelInputs

PREFIX = 2
SUPERVISED = (3, 4, 6, 0)
"""Steps of the samples' chunks that may be learned, the prefix included."""
SAME = 2e-5
"""Relative to the largest gradient: float32 sums in another order."""
LOGGED = 1e-5
"""Relative: the same, of a single number."""

FLOW = ("flow.repeat=2", "flow.frequency_weight=1", "optim.clip_norm=1e9", "optim.steps=1", "run.log_every=1")
CHOICE = ("choice.candidates=2", "data.language_every=2", *FLOW[2:])


def uneven(number: int):
    sample = robot_sample(number)
    mask = sample.mask.copy()
    mask[SUPERVISED[number] :] = False
    return replace(sample, mask=mask)


def talk(number: int):
    """A sample whose answer is longer for a larger number."""
    sample = language_sample(number)
    question, (role, answer) = sample.conversations
    return replace(sample, conversations=(question, (role, answer + " So it is." * number)))


ROBOT = [uneven(number) for number in range(4)]
TALKS = [talk(number) for number in range(4)]


class Listed:
    """These micro-batches, again and again."""

    def __init__(self, *batches):
        self.batches, self.number = batches, 0

    def __next__(self):
        self.number += 1
        return self.batches[(self.number - 1) % len(self.batches)]

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def draw_alike(config, generator, batch, length, width):
    """In the place of draw_flow: every row gets the same, so that it does not matter which micro-batch it is in."""
    rows = config.repeat * batch
    noise = torch.randn(length, width, generator=torch.Generator().manual_seed(5)).expand(rows, -1, -1)
    return FlowDraw(noise, torch.full((rows,), 0.4), PREFIX, torch.zeros(PREFIX, dtype=torch.bool))


def one_step(recipe, base, folder, assignments, *batches):
    """Runs one step over the micro-batches of this process; the gradients are left in folder/gradients.safetensors."""
    folder.mkdir(exist_ok=True)
    config = config_for(recipe, base, f"optim.accumulate={len(batches)}", *assignments)
    trainer_module.draw_flow, kept = draw_alike, trainer_module.draw_flow
    try:
        with world() as here:
            trainer = Trainer(config, folder, here, Listed(*batches), None, statistics())

            def keep(*_):
                learning = [(name, p.grad) for name, p in trainer.policy.named_parameters() if p.requires_grad]
                whole = {name: grad.full_tensor().clone() for name, grad in learning if grad is not None}
                if here.is_main:
                    save_file(whole, folder / "gradients.safetensors")

            trainer.optimizer.register_step_pre_hook(keep)
            trainer.run()
    finally:
        trainer_module.draw_flow = kept


def assert_same_step(folder, expected):
    gradients, wanted = (load_file(path / "gradients.safetensors") for path in (folder, expected))
    assert gradients.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=SAME * largest, msg=name)
    (line,), (right,) = metrics(folder), metrics(expected)
    terms = {"loss", "mse", "frequency", "winner_l1", "score", "next_token", "grad_norm"} & right.keys()
    assert len(terms) >= 4
    assert {name: line[name] for name in terms} == pytest.approx({name: right[name] for name in terms}, rel=LOGGED)


@pytest.mark.parametrize("masked", ["true", "false"], ids=["masked", "unmasked"])
def test_two_micro_batches_are_one_of_twice_the_size(masked, base, tmp_path):
    assignments = (*FLOW, f"flow.frequency_masked={masked}")
    one_step("post_train_sync", base, tmp_path / "one", assignments, ROBOT)
    one_step("post_train_sync", base, tmp_path / "two", assignments, ROBOT[:2], ROBOT[2:])
    assert_same_step(tmp_path / "two", tmp_path / "one")


def test_robot_and_language_data_keep_their_shares_of_the_step(base, tmp_path):
    one_step("pretrain_vlm", base, tmp_path / "one", CHOICE, ROBOT, TALKS)
    halves = (ROBOT[:2], TALKS[:2], ROBOT[2:], TALKS[2:])
    one_step("pretrain_vlm", base, tmp_path / "two", CHOICE, *halves)
    assert_same_step(tmp_path / "two", tmp_path / "one")


def one_of_two(base, folder, rank, ports):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    os.environ.update({name: str(value) for name, value in places.items()})
    first = 2 * rank
    one_step("post_train_sync", base, folder / "flow", FLOW, ROBOT[first : first + 1], ROBOT[first + 1 : first + 2])
    mine = slice(first, first + 2)
    os.environ["MASTER_PORT"] = str(ports[1])
    one_step("pretrain_vlm", base, folder / "choice", CHOICE, ROBOT[mine], TALKS[mine])


def test_two_processes_are_one_batch_of_all_their_micro_batches(base, tmp_path):
    with socket.socket() as free, socket.socket() as another:
        free.bind(("127.0.0.1", 0))
        another.bind(("127.0.0.1", 0))
        ports = free.getsockname()[1], another.getsockname()[1]
    processes = [FORKED.Process(target=one_of_two, args=(base, tmp_path, rank, ports)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        one_step("post_train_sync", base, tmp_path / "flow-alone", FLOW, ROBOT)
        one_step("pretrain_vlm", base, tmp_path / "choice-alone", CHOICE, ROBOT, TALKS)
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert_same_step(tmp_path / "flow", tmp_path / "flow-alone")
    assert_same_step(tmp_path / "choice", tmp_path / "choice-alone")


def inputs(rows: int) -> ModelInputs:
    nothing = torch.empty(rows, 0)
    return ModelInputs(nothing, nothing, nothing, (), nothing, 0, nothing, nothing)


def robot(*steps: int) -> RobotBatch:
    """Samples of 6 steps and one column, supervised up to a step each."""
    mask = torch.tensor([[[float(step < upto)] for step in range(6)] for upto in steps])
    return RobotBatch(inputs(len(steps)), torch.zeros_like(mask), mask, ("",) * len(steps))


def language(tokens: int) -> LanguageBatch:
    labels = torch.full((1, 9), IGNORED)
    labels[0, 9 - tokens :] = 7
    return LanguageBatch(inputs(1), labels, ("",))


def drawn(rows: int, prefix: int) -> FlowDraw:
    return FlowDraw(torch.zeros(rows, 6, 1), torch.zeros(rows), prefix, torch.zeros(prefix, dtype=torch.bool))


def test_counts_of_a_micro_batch():
    assert count(robot(6, 3, 0), drawn(6, 2)) == Counts(elements=2 * (4 + 1 + 0), rows=6)
    assert count(robot(6, 3, 0), None) == Counts(samples=2)
    assert count(language(4), None) == Counts(tokens=4)
    # The first token has nothing before it that could predict it.
    assert count(language(9), None) == Counts(tokens=8)


def test_every_micro_batch_divides_by_the_steps_part_of_one_process():
    batches, draws = [robot(6, 6), robot(2, 1)], [drawn(2, 2), drawn(2, 0)]
    alone = step_counts(batches, draws, lambda values: values)
    assert alone[:2] == (8 + 3, 4)
    # Three more processes with as much: a process divides by its quarter of them all.
    assert step_counts(batches, draws, lambda values: 4 * values)[:2] == (11, 4)
    mixed = step_counts([robot(6), robot(0), robot(6), language(4)], [None] * 4, lambda values: values)
    # Three quarters of the loss are the robot's, whose mean is over two samples.
    assert (mixed.samples, mixed.tokens) == pytest.approx((2 / 0.75, 4 / 0.25))
    nothing = step_counts([robot(0)], [drawn(1, 0)], lambda values: values)
    assert nothing.elements == 1
