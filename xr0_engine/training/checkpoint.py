"""A run's checkpoints: saved beside the training, complete or not there, resumed exactly; and their export.

`checkpoints/step-00000200/` holds torch.distributed.checkpoint's files (trained weights, optimiser state) and
`progress.json` with the step and the data position. There is no random state to save (draws.py). A checkpoint is
written under another name and renamed when whole: whatever kills the run, what bears the name is complete.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from xr0_engine.config import ModelConfig
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.files import read_json, reading, whole
from xr0_engine.model.adapter import DOWN, UP, AdapterInfo, merged, pair_of
from xr0_engine.model.weights import checkpoint_shapes, read_tensor
from xr0_engine.model.writing import stored_sizes, write_weights
from xr0_engine.robot.embodiment import CHECKPOINT_KEY, Embodiment
from xr0_engine.robot.limits import VIDEO_FILE
from xr0_engine.robot.normalize import STATISTICS_FILE, ActionStatistics
from xr0_engine.training.base import Base, fresh_head
from xr0_engine.training.config import LoraConfig
from xr0_engine.training.distributed import World
from xr0_engine.training.model import checkpoint_name
from xr0_engine.training.optim import state_of
from xr0_engine.types import CheckpointError
from xr0_engine.whole import publish, refuse_used, whole_folder

STEP_PREFIX = "step-"
PARTIAL = ".partial"
PROGRESS_FILE = "progress.json"
WEIGHTS, AVERAGE = "model.", "average."
"""Before parameters' names in a checkpoint."""
EXPORT_DTYPE = torch.bfloat16


class Checkpointer:
    """Saves and restores one run's training state. Every process calls every method, at the same steps."""

    def __init__(
        self,
        folder: Path,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep_last: int,
        average: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """average: parameter's name -> what is kept beside it (optim.py: Average)."""
        self._folder, self._world, self._model, self._optimizer = folder, world, model, optimizer
        self._keep_last, self._average = keep_last, average
        self._pending: tuple[Future[Any], Path] | None = None
        if world.is_main:
            for partial in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(partial)
        world.barrier()

    def save(self, step: int, progress: Mapping[str, Any]) -> None:
        """Copy the state and write it while training goes on; waits for the write before, if it is not done.

        progress: as JSON holds it, the same in every process. Raises OSError if the disk lacks the room, as poll does.
        """
        self.wait()
        final = self._folder / f"{STEP_PREFIX}{step:08d}"
        if final.exists():
            return
        state = self._state()
        partial = final.with_name(final.name + PARTIAL)
        self._begin(partial, state, progress)
        # Written from a copy, through a group of its own: training may change the weights and use its group meanwhile.
        future = async_save(state, storage_writer=FileSystemWriter(partial), process_group=self._world.io_group)
        assert isinstance(future, Future)
        self._pending = (future, final)

    def poll(self) -> None:
        """Give a checkpoint that has been written its name. Raises what went wrong in writing it."""
        if self._pending is not None and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """As poll, after waiting for the write."""
        if self._pending is None:
            return
        future, final = self._pending
        self._pending = None
        partial = final.with_name(final.name + PARTIAL)
        try:
            future.result()
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"checkpoint {final} could not be written: {error}; earlier ones are whole") from error
        if self._world.is_main:
            publish(partial, final)
            for old in checkpoints(self._folder)[: -self._keep_last]:
                # Out of the list first: half of a deleted checkpoint must not look like one.
                doomed = old.with_name(old.name + PARTIAL)
                os.replace(old, doomed)
                shutil.rmtree(doomed)

    def save_aside(self, folder: Path, progress: Mapping[str, Any]) -> None:
        """Write the state to a folder of another name, and wait: for a run that stops on an error."""
        state = self._state()
        self._begin(folder, state, progress)
        save(state, storage_writer=FileSystemWriter(folder), process_group=self._world.io_group)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into model and optimiser. Returns its progress.

        Raises CheckpointError that names tensors that are missing, unexpected or of another shape. Warns of one that
        holds no moments behind its step: the optimiser then begins anew.
        """
        state = self._state()
        found = _stored_shapes(folder)
        faults = [f"missing {name}" for name in state if name not in found]
        faults += [
            f"{name} has shape {found[name]}, expected {tuple(value.shape)}"
            for name, value in state.items()
            if name in found and found[name] != tuple(value.shape)
        ]
        faults += [f"unexpected {name}" for name in found if name not in state]
        if faults:
            raise CheckpointError(f"{folder} does not fit this run: " + "; ".join(faults[:12]))
        load(state, storage_reader=FileSystemReader(folder), process_group=self._world.io_group)
        progress = read_json(folder / PROGRESS_FILE)
        with reading(folder / PROGRESS_FILE):
            if progress:
                whole(progress, "step", least=0)
        if self._world.is_main and progress and progress["step"] > 0:
            self._warn_without_moments(folder, state)
        return dict(progress)

    def _warn_without_moments(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Earlier versions saved none at a step that had just been validated (trainer.py: reshard)."""
        counts = [value for name, value in state.items() if name.startswith("optim.") and name.endswith(".step")]
        if any(bool(count.any()) for count in counts):
            return
        others = [path.name for path in checkpoints(self._folder) if path != folder]
        remedy = "the run has no other checkpoint; start it again"
        if others:
            remedy = f"remove this checkpoint to resume from {others[-1]}, if that was not validated; or start again"
        warnings.warn(
            f"{folder}: it holds no moments of the optimiser, which begins anew, and its weights are rounded to "
            "model.dtype: an earlier version saved it so at a step that it had just validated. This run will not be "
            f"the one that was cut off; for an exact one, {remedy}",
            stacklevel=3,
        )

    def _state(self) -> dict[str, Tensor]:
        """Name -> live tensor of everything that training changes; optimiser state that is not there yet is made."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            state[f"{WEIGHTS}{name}"] = parameter.detach()
            moments = state_of(self._optimizer, parameter)
            state |= {f"optim.{name}.{key}": value for key, value in moments.items()}
        return state | {f"{AVERAGE}{name}": value for name, value in self._average.items()}

    def _begin(self, folder: Path, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """A fresh folder with the progress in it, if the disk has the room for what all processes write."""
        fault = ""
        if self._world.is_main:
            needed = sum(value.numel() * value.element_size() for value in state.values())
            # Not before: a run that is killed without a config has left nothing, and can be started again.
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                fault = f"{self._folder} has {free / 2**30:.2f} GiB free; a checkpoint takes {needed / 2**30:.2f} GiB"
            else:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        fault = self._world.gather(fault)[0]
        if fault:
            raise OSError(errno.ENOSPC, fault)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's checkpoint folder, oldest first."""
    return sorted(path for path in folder.glob(f"{STEP_PREFIX}*") if path.suffix != PARTIAL)


@dataclass(frozen=True)
class Export:
    """What a run writes as folders that the engine loads, whatever weights it has by then.

    config: the trained model's. statistics: of the training data alone. seed: the run's, of an action head that neither
    base nor run gives. embodiment: the profile that the run named, which the checkpoint then says. lora: the run's.
    """

    config: ModelConfig
    base: Base
    statistics: Mapping[str, ActionStatistics]
    seed: int
    embodiment: Embodiment | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def of_checkpoint(self, checkpoint: Path, out: Path, average: bool = False) -> None:
        """Write the base with everything that the run has trained by a checkpoint, a folder of checkpoints().

        average: the moving average of it. out: absent or empty, appears whole or not at all. bfloat16. Raises
        CheckpointError, ValueError, also for an average that the run did not keep, or OSError.
        """
        trained = _Trained(checkpoint, average)
        self._write(out, trained.keys, trained.read)

    def of_weights(self, weights: Mapping[str, Tensor], out: Path) -> None:
        """As of_checkpoint, of trained_weights()."""
        self._write(out, weights, lambda names: {name: weights[name] for name in names})

    def adapter_of_checkpoint(self, checkpoint: Path, out: Path, average: bool = False) -> None:
        """Write what the run has trained alone, as a folder that the engine loads over the base: whole tensors as
        of_checkpoint does, adapters float32. Raises as that does; ValueError for a run without adapters."""
        base = self.base
        if not self.lora.rank:
            raise ValueError("--adapter: the run has no adapters, it trained layers whole: leave the option out")
        if not base.has_head:
            raise ValueError(f"--adapter: {base.folder} is a VLM, which no engine loads: leave the option out")
        refuse_used(out)
        trained = _Trained(checkpoint, average)
        shapes = checkpoint_shapes(self.config)
        pairs = [half for name in shapes for half in pair_of(name) if half in trained.keys]
        whole = [name for name in shapes if name in trained.keys]
        sizes = stored_sizes({half: trained.shape(half) for half in pairs}, torch.float32)
        sizes |= stored_sizes({name: shapes[name] for name in whole}, EXPORT_DTYPE)
        lora, name = self.lora, base.name.rpartition("/")[2] if Path(base.name).is_absolute() else base.name
        info = AdapterInfo(lora.rank, lora.alpha, lora.targets, name, checkpoint_hash(base.folder))
        with whole_folder(out, sum(sizes.values())) as target:
            self._describe(target)
            learned = trained.read([*pairs, *whole])
            info.write(target, learned | {name: learned[name].to(EXPORT_DTYPE) for name in whole})

    def _write(self, out: Path, trained: Container[str], read: Callable[[list[str]], dict[str, Tensor]]) -> None:
        """trained: names of what the run has trained, halves of adapters too. read: some of them -> tensors."""
        base, config = self.base, self.config
        refuse_used(out)
        shapes = checkpoint_shapes(config)
        fresh = {} if base.has_head else fresh_head(config, self.seed)

        def tensors(names: list[str]) -> dict[str, Tensor]:
            pairs = {name: pair_of(name) for name in names if pair_of(name)[0] in trained}
            learned = read(
                [name for name in names if name in trained] + [half for pair in pairs.values() for half in pair]
            )
            for name in names:
                if name not in learned:
                    learned[name] = read_tensor(base.stored[name]) if name in base.stored else fresh[name]
            for name, (down, up) in pairs.items():
                learned[name] = merged(learned[name], learned[down], learned[up], self.lora.alpha / self.lora.rank)
            return {name: learned[name].to(EXPORT_DTYPE).contiguous() for name in names}

        sizes = stored_sizes(shapes, EXPORT_DTYPE)
        with whole_folder(out, sum(sizes.values())) as target:
            self._describe(target)
            write_weights(target, sizes, tensors)

    def _describe(self, target: Path) -> None:
        """All but the weights."""
        base = self.base
        preprocessor = base.preprocessor()
        preprocessor["action_config"] = {name: item.to_json() for name, item in self.statistics.items()}
        told = {} if self.embodiment is None else {CHECKPOINT_KEY: asdict(self.embodiment)}
        (target / "config.json").write_text(json.dumps(self.config.to_hf() | told, indent=2), encoding="utf-8")
        (target / STATISTICS_FILE).write_text(json.dumps(preprocessor), encoding="utf-8")
        if (videos := base.video_preprocessor()) is not None:
            (target / VIDEO_FILE).write_text(json.dumps(videos), encoding="utf-8")
        for file in base.folder.glob("*.json"):
            if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab")):
                shutil.copy(file, target / file.name)


class _Trained:
    """The trained tensors of a checkpoint, or their moving average. keys: XR-0's name, or an adapter's, -> the
    checkpoint's."""

    def __init__(self, checkpoint: Path, average: bool) -> None:
        self._checkpoint, self._shapes = checkpoint, _stored_shapes(checkpoint)
        prefix = AVERAGE if average else WEIGHTS
        self.keys = {checkpoint_name(key.removeprefix(prefix)): key for key in self._shapes if key.startswith(prefix)}
        if not self.keys:
            raise ValueError("--average: the run keeps no average of its weights; optim.average=0.999 has it kept")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self.keys[name]]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """float32."""
        learned = {self.keys[name]: torch.empty(self.shape(name)) for name in names}
        with warnings.catch_warnings():
            # That one process reads alone is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(learned, storage_reader=FileSystemReader(self._checkpoint), no_dist=True)
        return {name: learned[self.keys[name]] for name in names}


def trained_weights(policy: nn.Module, world: World) -> dict[str, Tensor]:
    """XR-0's name -> what training has made of it so far, as it is exported, on the CPU of the main process; of
    adapters the halves, float32.

    Every process calls it; the others get none.
    """
    weights = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if world.is_main:
                dtype = torch.float32 if name.endswith((f".{DOWN}", f".{UP}")) else EXPORT_DTYPE
                weights[checkpoint_name(name)] = whole.to("cpu", dtype, copy=True)
    return weights


def _stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    if not (checkpoint / ".metadata").is_file():
        raise CheckpointError(f"{checkpoint} holds no complete training checkpoint")
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
