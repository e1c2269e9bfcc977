"""The moving average of the weights: kept, resumed bit for bit, exported by choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.training.support import Numbered, config_for, metrics, robot_sample, statistics, train
from xr0_engine import Engine
from xr0_engine.model.adapter import WEIGHTS_FILE
from xr0_engine.training.base import read_base
from xr0_engine.training.checkpoint import Export, _Trained, checkpoints
from xr0_engine.training.distributed import world
from xr0_engine.training.model import model_config
from xr0_engine.training.trainer import Trainer

DECAY = 0.75
"""Each step's share is a power of two: no rounding but that of lerp."""
SHORT = ("optim.steps=4", "optim.warmup_steps=0", "run.log_every=1", "run.checkpoint_every=2", "lora.rank=4")


def config_of(base, *assignments):
    return config_for("lora", base, *SHORT, f"optim.average={DECAY}", *assignments)


class Stopped(Exception):
    pass


class StopsAtThree(Numbered):
    def __next__(self):
        if self.number == 3:
            raise Stopped
        return super().__next__()


def whole(parameter):
    return parameter.detach().full_tensor().clone()


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Its folder, and what the average must be by the weights after each step."""
    folder, kept = tmp_path_factory.mktemp("average") / "run", {}
    config = config_of(base)
    with world() as here:
        trainer = Trainer(config, folder, here, Numbered(robot_sample, 4), None, statistics())
        learning = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
        kept = {name: whole(p) for name, p in learning.items()}
        update = trainer.average.update

        def followed(named):
            update(named)
            for name, parameter in learning.items():
                kept[name] = DECAY * kept[name] + (1 - DECAY) * whole(parameter)

        trainer.average.update = followed
        trainer.run()
    return folder, kept


def exporter(config, base):
    start = read_base(base)
    tables = {name: replace(item, epsilon=1e-6) for name, item in statistics().items()}
    return Export(model_config(start.config, config), start, tables, 0, None, config.lora)


def test_it_is_the_average_of_what_each_step_made(run):
    folder, expected = run
    last = checkpoints(folder / "checkpoints")[-1]
    found = _Trained(last, True)
    averages = found.read(list(found.keys))
    assert len(averages) == len(expected)
    for name, value in expected.items():
        torch.testing.assert_close(averages[name.removeprefix("head.")], value)
    weights = _Trained(last, False).read(["sink.weight"])
    assert not torch.equal(weights["sink.weight"], averages["sink.weight"])


def test_a_resumed_run_keeps_it_bit_for_bit(base, run, tmp_path):
    config = config_of(base)
    with pytest.raises(Stopped):
        train(config, tmp_path, source=StopsAtThree(robot_sample, 4))
    resumed = train(config, tmp_path)
    assert [line["loss"] for line in resumed] == [line["loss"] for line in metrics(run[0])]
    states = []
    for folder in (run[0], tmp_path):
        found = _Trained(checkpoints(folder / "checkpoints")[-1], True)
        states.append(found.read(list(found.keys)))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_it_does_not_change_what_is_trained(base, run, tmp_path):
    plain = train(config_of(base, "optim.average=0"), tmp_path)
    assert [line["loss"] for line in plain] == [line["loss"] for line in metrics(run[0])]
    file = "model-00001-of-00001.safetensors"
    assert (tmp_path / "model" / file).read_bytes() == (run[0] / "model" / file).read_bytes()
    last = checkpoints(tmp_path / "checkpoints")[-1]
    with pytest.raises(
        ValueError, match=r"--average: the run keeps no average of its weights; optim.average=0.999 has"
    ):
        exporter(config_of(base), base).of_checkpoint(last, tmp_path / "out", average=True)
    assert not (tmp_path / "out").exists()


def test_it_is_exported_by_choice_merged_or_alone(base, run, tmp_path):
    folder, expected = run
    last, export = checkpoints(folder / "checkpoints")[-1], exporter(config_of(base), base)
    export.of_checkpoint(last, tmp_path / "merged", average=True)
    export.adapter_of_checkpoint(last, tmp_path / "adapter", average=True)
    held = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    torch.testing.assert_close(held["sink.weight"], expected["head.sink.weight"].bfloat16())
    engines = Engine.from_pretrained(base, adapter=tmp_path / "adapter"), Engine.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(*pair) for pair in zip(*(engine.model.parameters() for engine in engines), strict=True))
    trained = Engine.from_pretrained(folder / "model")
    assert not torch.equal(trained.model.head.sink.weight, engines[0].model.head.sink.weight)
