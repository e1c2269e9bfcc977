"""The training loop: one file that can be read from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from xr0_engine.backend import resolve_dtype
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator, LanguageBatch, RobotBatch
from xr0_engine.training.checkpoint import Checkpointer, checkpoints, export_checkpoint
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.counts import Counts, step_counts
from xr0_engine.training.data.samples import LanguageSample, RobotSample
from xr0_engine.training.distributed import World, shard
from xr0_engine.training.draws import FlowDraw, draw_flow, micro_batch_generator
from xr0_engine.training.metrics import Averages, Log, Speed, model_flops, peak_tflops
from xr0_engine.training.model import FlowPolicy, StepOutput, build_policy, load_policy, model_config
from xr0_engine.training.optim import learning_rate, make_optimizer, set_learning_rate
from xr0_engine.training.profiles import run_profile
from xr0_engine.training.validation import plot_run, validate

Batch: TypeAlias = RobotBatch | LanguageBatch

CHECKPOINTS = "checkpoints"
EXPORTED = "model"


class Source(Protocol):
    """An endless iterator over lists of samples that can be continued where it was (data/stream.py)."""

    def __next__(self) -> list[Any]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Trainer:
    """One run in a folder: resumes from its last checkpoint if it has one, else starts.

    source: micro-batches of this process. validation: gives the same samples whenever it is called, in every process;
    None = no validation. statistics: of the training data by robot type. Raises ValueError and CheckpointError before
    any work.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        world: World,
        source: Source,
        validation: Callable[[], Iterable[RobotSample]] | None,
        statistics: Mapping[str, ActionStatistics],
    ) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.source, self.validation = source, validation
        self.base = read_base(config.model.checkpoint)
        self.xr0 = model_config(self.base.config, config)
        _check_statistics(statistics, config.data.chunk_length, self.xr0.head.action_dim)
        self.statistics = {name: replace(item, epsilon=self.xr0.std_epsilon) for name, item in statistics.items()}
        self.profile = run_profile(config.data)
        self.collate = Collator(self.base.folder, self.xr0, self.statistics, self.profile)
        if world.device.type == "cpu" and config.run.threads:
            torch.set_num_threads(config.run.threads)

        self.policy = build_policy(config, self.xr0)
        shard(self.policy, world.mesh, resolve_dtype(config.model.dtype))
        load_policy(self.policy, config, self.xr0, self.base, world.device)
        self.optimizer = make_optimizer(self.policy, config.optim)
        self.checkpointer = Checkpointer(folder / CHECKPOINTS, world, self.policy, self.optimizer, config.run.keep_last)
        self.step = 0
        saved = checkpoints(folder / CHECKPOINTS)
        if saved:
            progress = self.checkpointer.restore(saved[-1])
            self.step = progress["step"]
            self.source.load_state_dict(progress["data"])

    def run(self) -> None:
        """Train to the last step, then export a folder that the engine loads to `model/` in the run's folder."""
        config, world = self.config.run, self.world
        log = Log(self.folder, self.config.optim.steps, self.step) if world.is_main else None
        peak = config.peak_tflops or peak_tflops(world.device)
        try:
            # What the run starts from.
            if self.validation and self.step == 0:
                metrics = self._validate()
                if log:
                    log.write(0, metrics)
            averages, speed = Averages(), Speed()
            with self._steps() as steps:
                while self.step < self.config.optim.steps:
                    progress = self._train_step(*next(steps), averages, speed)
                    self.checkpointer.poll()
                    is_last = self.step == self.config.optim.steps
                    metrics = {}
                    if is_last or self.step % config.log_every == 0:
                        metrics |= averages.take(world) | speed.take(world, peak)
                    if self.validation and (is_last or self.step % config.validate_every == 0):
                        metrics |= self._validate()
                    if log:
                        log.step(self.step)
                        if metrics:
                            log.write(self.step, metrics)
                    if is_last or self.step % config.checkpoint_every == 0:
                        self.checkpointer.save(self.step, progress)
        finally:
            if log:
                log.close()
            # What went wrong in training is no reason to lose a checkpoint that is being written.
            self.checkpointer.wait()
        if world.is_main:
            if self.validation:
                plot_run(self.folder, self.folder / "curve.png")
            if not (self.folder / EXPORTED).exists():
                export_checkpoint(
                    checkpoints(self.folder / CHECKPOINTS)[-1],
                    self.folder / EXPORTED,
                    self.xr0,
                    self.base,
                    self.statistics,
                    self.config.run.seed,
                    self.profile,
                )
        world.barrier()

    def _train_step(
        self, batches: Sequence[Batch], position: Mapping[str, Any], averages: Averages, speed: Speed
    ) -> dict[str, Any]:
        """One optimiser step on its micro-batches. position: behind them. Returns the progress to save with it."""
        rate = learning_rate(self.config.optim, self.step)
        set_learning_rate(self.optimizer, rate)
        draws = [self._draw(batch, self.step * len(batches) + micro) for micro, batch in enumerate(batches)]
        counts = step_counts(batches, draws, self.world.sum)
        samples, flops = 0, 0.0
        for batch, draw in zip(batches, draws, strict=True):
            output = self._forward(batch.to(self.world.device), draw, counts)
            output.loss.backward()
            self._report(output, draw, 1 / len(batches), averages)
            samples += len(batch.sources)
            flops += self._flops(batch)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.clip_norm)
        # Its sum runs over all processes: they all see the same number, and a loss of NaN in any of them.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not bool(norm.isfinite()):
            self._stop_on_nan(output, [source for batch in batches for source in batch.sources], position)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        one = torch.ones((), device=norm.device)
        averages.add("grad_norm", norm, one)
        averages.add("learning_rate", one * rate, one)
        speed.count(samples, flops)
        return {"step": self.step, "data": position}

    def _draw(self, batch: Batch, number: int) -> FlowDraw | None:
        """Of a micro-batch, None where nothing is drawn; number: of the micro-batch in this process."""
        if not (isinstance(batch, RobotBatch) and isinstance(self.policy, FlowPolicy)):
            return None
        generator = micro_batch_generator(self.config.run.seed, number * self.world.size + self.world.rank)
        return draw_flow(self.config.flow, generator, *batch.actions.shape)

    def _forward(self, batch: Batch, draw: FlowDraw | None, counts: Counts) -> StepOutput:
        output: StepOutput = self.policy(batch, counts) if draw is None else self.policy(batch, draw, counts)
        return output

    def _report(self, output: StepOutput, draw: FlowDraw | None, share: float, averages: Averages) -> None:
        """share: of the step that this micro-batch is; its sums are divided so that the step's shares give the mean."""
        for name, value in output.parts.items():
            averages.add(name, value, torch.full_like(value, share))
        if draw is not None:
            assert output.square_error is not None
            assert output.supervised is not None
            averages.add_flow(draw.t, output.square_error, output.supervised)

    @contextmanager
    def _steps(self) -> Iterator[Iterator[tuple[list[Batch], dict[str, Any]]]]:
        """The micro-batches of one step after the other; those of the next are made while one is used."""

        def steps() -> Iterator[tuple[list[Batch], dict[str, Any]]]:
            ready = executor.submit(self._make_step)
            while True:
                made = ready.result()
                ready = executor.submit(self._make_step)
                yield made

        executor = ThreadPoolExecutor(1, "batches")
        try:
            yield steps()
        finally:
            executor.shutdown(cancel_futures=True)

    def _make_step(self) -> tuple[list[Batch], dict[str, Any]]:
        """Its micro-batches, and the source's state behind them."""
        batches = [self._make_batch() for _ in range(self.config.optim.accumulate)]
        return batches, dict(self.source.state_dict())

    def _make_batch(self) -> Batch:
        samples = next(self.source)
        is_language = isinstance(samples[0], LanguageSample)
        return self.collate.language(samples) if is_language else self.collate.robot(samples)

    def _validate(self) -> dict[str, Any]:
        assert self.validation is not None
        batch_size = self.config.data.batch_size
        result = validate(self.policy, self.collate, self.validation(), batch_size, self.statistics, self.world)
        return {f"validation/{name}": value for name, value in result.items()}

    def _stop_on_nan(self, output: StepOutput, sources: list[str], position: Mapping[str, Any]) -> None:
        folder = self.folder / f"nan-step-{self.step + 1:08d}"
        self.checkpointer.wait()
        self.checkpointer.save_aside(folder, {"step": self.step, "data": position})
        mine = {"rank": self.world.rank, "loss": str(output.loss.item()), "samples": sources}
        batches = self.world.gather(mine)
        if self.world.is_main:
            (folder / "batch.json").write_text(json.dumps(batches, indent=2), encoding="utf-8")
        raise RuntimeError(
            f"step {self.step + 1}: the loss or its gradient is not finite. The state before the step and the batch's "
            f"samples (batch.json) are in {folder}; this process had {', '.join(sources[:8])}"
        )

    def _flops(self, batch: Batch) -> float:
        is_flow = isinstance(self.policy, FlowPolicy)
        draws = self.config.flow.repeat if is_flow else 0
        trains_vlm = self.config.model.train != "head"
        return model_flops(self.xr0, batch.inputs, draws, self.config.data.chunk_length, trains_vlm)


def _check_statistics(statistics: Mapping[str, ActionStatistics], length: int, width: int) -> None:
    faults = [
        f"robot type {name!r} has shape {item.mean.shape}"
        for name, item in statistics.items()
        if item.mean.shape != (length, width)
    ]
    if not statistics:
        faults = ["there are none"]
    if faults:
        raise ValueError(
            f"statistics: expected shape {(length, width)} (data.chunk_length, action_dim): {'; '.join(faults)}"
        )
