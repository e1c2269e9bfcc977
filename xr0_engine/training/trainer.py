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
from xr0_engine.model.vision import VisionTower
from xr0_engine.model.weights import read_tensor
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator, LanguageBatch, RobotBatch
from xr0_engine.training.checkpoint import Checkpointer, Export, checkpoints, trained_weights
from xr0_engine.training.closed_loop import FOLDER, ClosedLoop, drive, find_closed_loop
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.counts import Counts, step_counts
from xr0_engine.training.data.samples import LanguageSample, RobotSample
from xr0_engine.training.distributed import World, reshard, shard
from xr0_engine.training.draws import FlowDraw, draw_flow, micro_batch_generator
from xr0_engine.training.metrics import Averages, Log, Speed, model_flops, peak_tflops
from xr0_engine.training.model import FlowPolicy, StepOutput, build_policy, load_policy, model_config, set_parameter
from xr0_engine.training.optim import Average, learning_rate, make_optimizer, set_learning_rate
from xr0_engine.training.profiles import run_profile
from xr0_engine.training.run_folder import CHECKPOINTS, EXPORTED
from xr0_engine.training.standardize import standardize_vision
from xr0_engine.training.validation import plot_run, validate

Batch: TypeAlias = RobotBatch | LanguageBatch


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
        _check_states(statistics, config.data.state_quantiles)
        self.statistics = {name: replace(item, epsilon=self.xr0.std_epsilon) for name, item in statistics.items()}
        profile, drives = run_profile(config.data), config.run.closed_loop
        self.closed_loop = find_closed_loop(drives) if drives else None
        self.export = Export(self.xr0, self.base, self.statistics, config.run.seed, profile, config.lora)
        is_joint, states = config.objective == "joint", config.choice.state_tokens
        self.collate = Collator(self.base.folder, self.xr0, self.statistics, profile, is_joint, states)
        if world.device.type == "cpu" and config.run.threads:
            torch.set_num_threads(config.run.threads)

        self.policy = build_policy(config, self.xr0)
        shard(self.policy, world.mesh, resolve_dtype(config.model.dtype))
        load_policy(self.policy, config, self.xr0, self.base, world.device)
        self.optimizer = make_optimizer(self.policy, config.optim)
        self.average = Average(self.policy, config.optim.average)
        self.checkpointer = Checkpointer(
            folder / CHECKPOINTS, world, self.policy, self.optimizer, config.run.keep_last, self.average.weights
        )
        self.step = 0
        saved = checkpoints(folder / CHECKPOINTS)
        if saved:
            progress = self.checkpointer.restore(saved[-1])
            self.step = progress["step"]
            self.source.load_state_dict(progress["data"])
        elif config.model.standardize_vision:
            self._standardize_vision()
            self.average.begin(self.policy.named_parameters())

    def run(self) -> None:
        """Train to the last step, then export a folder that the engine loads to `model/` in the run's folder."""
        config, world = self.config.run, self.world
        log = Log(self.folder, self.config, self.step) if world.is_main else None
        peak = config.peak_tflops or peak_tflops(world.device)
        try:
            # What the run starts from.
            if self.step == 0:
                metrics = self._checks()
                if log and metrics:
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
                    with speed.paused():
                        metrics |= self._checks()
                    if log:
                        log.step(self.step)
                        if metrics:
                            log.write(self.step, metrics)
                    if is_last or self.step % config.checkpoint_every == 0:
                        self.checkpointer.save(self.step, progress)
        finally:
            if log:
                log.close(failed=self.step < self.config.optim.steps)
            # What went wrong in training is no reason to lose a checkpoint that is being written.
            self.checkpointer.wait()
        if world.is_main:
            if self.validation or self.closed_loop:
                plot_run(self.folder, self.folder / "curve.png")
            if not (self.folder / EXPORTED).exists():
                self.export.of_checkpoint(checkpoints(self.folder / CHECKPOINTS)[-1], self.folder / EXPORTED)
        world.barrier()

    def _standardize_vision(self) -> None:
        """By the first batch with pictures of the training data, which it is then trained on as well."""
        if self.world.size > 1:
            raise ValueError("model.standardize_vision: expected one process, whose first batch says it")
        begin = dict(self.source.state_dict())
        inputs = self._make_batch().inputs
        self.source.load_state_dict(begin)
        tower = VisionTower(self.xr0.vision)
        prefix = "vlm.model.visual."
        tower.load_state_dict({name: read_tensor(self.base.stored[prefix + name]) for name in tower.state_dict()})
        parameters = dict(self.policy.named_parameters())
        for name, value in standardize_vision(tower, inputs.pixel_values.float(), inputs.image_grids).items():
            set_parameter(parameters[prefix + name], value)

    def _train_step(
        self, batches: Sequence[Batch], position: Mapping[str, Any], averages: Averages, speed: Speed
    ) -> dict[str, Any]:
        """One optimiser step on its micro-batches. position: behind them. Returns the progress to save with it."""
        rate = learning_rate(self.config.optim, self.step)
        set_learning_rate(self.optimizer, rate)
        draws = [self._draw(batch, self.step * len(batches) + micro) for micro, batch in enumerate(batches)]
        counts = step_counts(batches, draws, self.world.sum, self.config.flow)
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
        self.average.update(self.policy.named_parameters())
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

    def _checks(self) -> dict[str, Any]:
        """What validation says of the policy at this step, open loop and closed loop; empty if neither is due."""
        run, is_last = self.config.run, self.step == self.config.optim.steps
        metrics: dict[str, Any] = {}
        if self.validation and (is_last or self.step % run.validate_every == 0):
            metrics |= self._validate(self.validation())
        if self.closed_loop and (is_last or self.step % run.closed_loop_every == 0):
            metrics |= self._drive(self.closed_loop)
        return metrics

    def _validate(self, samples: Iterable[RobotSample]) -> dict[str, Any]:
        data = self.config.data
        result = validate(
            self.policy, self.collate, samples, data.batch_size, self.statistics, self.world, data.validation_draws
        )
        reshard(self.policy)
        return {f"validation/{name}": value for name, value in result.items()}

    def _drive(self, function: ClosedLoop) -> dict[str, float]:
        """By the main process; the others wait."""
        weights, result = trained_weights(self.policy, self.world), {}
        if self.world.is_main:
            result = drive(
                self.config.run.closed_loop,
                function,
                self.folder / FOLDER,
                lambda out: self.export.of_weights(weights, out),
                self.world.device,
                self.config.model.dtype,
            )
        self.world.barrier()
        return result

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
        lora = self.config.lora
        text = vision = 1 if self.config.model.train == "head" else 2 if lora.rank else 3
        if lora.rank and "vision" not in lora.targets:
            # Nothing in the tower learns, so no gradient goes there.
            vision = 1
        return model_flops(self.xr0, batch.inputs, draws, self.config.data.chunk_length, text, vision)


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


def _check_states(statistics: Mapping[str, ActionStatistics], by_quantiles: bool) -> None:
    wrong = sorted(name for name, item in statistics.items() if (item.state is not None) != by_quantiles)
    if wrong and by_quantiles:
        raise ValueError(
            f"statistics: robot type {', '.join(wrong)}: expected quantiles of states (`state`), which xr0 data stats "
            "--quantiles writes; data.state_quantiles=false trains on states as they are"
        )
    if wrong:
        raise ValueError(
            f"statistics: robot type {', '.join(wrong)}: the file has quantiles of states (`state`), by which this "
            "recipe does not normalise them: make it without --quantiles, or set data.state_quantiles=true"
        )
