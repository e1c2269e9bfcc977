"""How much memory a training step will take, from sizes alone, and what to change where that is too much.

The policy runs one micro-batch forward and back on meta tensors (tracing.py), while what FSDP, AdamW and accumulation
hold is added up as distributed.py and optim.py have it. Nothing is loaded or computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from xr0_engine.backend import resolve_dtype
from xr0_engine.config import ModelConfig
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.training.base import Base
from xr0_engine.training.batch import Collator, RobotBatch
from xr0_engine.training.config import OptimConfig, TrainConfig, override
from xr0_engine.training.distributed import frozen_whole, own_groups
from xr0_engine.training.draws import FlowDraw, longest_prefix
from xr0_engine.training.model import FlowPolicy, Policy, build_policy, model_config
from xr0_engine.training.moments import moment_bytes, work_bytes
from xr0_engine.training.profiles import run_profile
from xr0_engine.training.tracing import META, Ledger, SizesAlone

GIB = 2**30
MASTER = torch.float32.itemsize
"""Bytes of a trained weight, of its gradient and of each of AdamW's two moments in float32."""
ON_A_GPU = 1 * GIB
"""Of a GPU's memory, for what is no tensor: CUDA's context, libraries' workspaces, what the allocator cannot use. It is
a guess, never measured."""


@dataclass(frozen=True)
class Forecast:
    """Bytes in one process when a step takes the most, by part.

    frozen: weights that do not learn. trained: float32 weights. moments: of AdamW. average: of optim.average. copies:
    of weights in the compute dtype, gathered for the step. gradients: in both dtypes. activations: all else, inputs
    among them.
    """

    frozen: int
    trained: int
    moments: int
    average: int
    copies: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def told(self) -> str:
        """One line a part, in GiB."""
        titles = {
            "frozen": "frozen weights",
            "trained": "trained weights, float32",
            "moments": "AdamW's moments",
            "average": "average of the weights",
            "copies": "copies in the compute dtype",
            "gradients": "gradients",
            "activations": "activations",
        }
        rows = [(title, getattr(self, name)) for name, title in titles.items() if name != "average" or self.average]
        return "\n".join(f"  {title:28} {size / GIB:8.3f} GiB" for title, size in [*rows, ("at most", self.total)])


def forecast(config: TrainConfig, xr0: ModelConfig, batch: RobotBatch, processes: int = 1) -> Forecast:
    """Of a step whose micro-batches are like this one. xr0: of model_config.

    Raises ValueError as build_policy does. Batches of language data are not looked at.
    """
    policy = build_policy(config, xr0)
    dtype = resolve_dtype(config.model.dtype)
    whole = frozen_whole(policy)
    account = _Account(policy, dtype, whole, config.optim, processes)
    for module in policy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            module.register_parameter(name, cast)
    account.follow(policy)
    image_tokens = int((batch.inputs.input_ids == xr0.tokens.image).sum())
    with SizesAlone(image_tokens) as sizes, account.ledger:
        there = batch.to(META)
        output = policy(there, _draw(config, there)) if isinstance(policy, FlowPolicy) else policy(there)
        sizes.backward(output.loss)
    account.optimize()
    return account.most


def forecast_run(
    config: TrainConfig, base: Base, statistics: Mapping[str, ActionStatistics], processes: int = 1
) -> Forecast:
    """The same of a run whose cameras give frames of 480x640 or less. Raises ValueError and CheckpointError."""
    xr0 = model_config(base.config, config)
    is_joint, states = config.objective == "joint", config.choice.state_tokens
    collate = Collator(base.folder, xr0, statistics, run_profile(config.data), is_joint, states)
    return forecast(config, xr0, collate.example(config.data.batch_size), processes)


def report(config: TrainConfig, take: Callable[[TrainConfig], Forecast], room: int | None, where: str = "") -> str:
    """The forecast by part, and what to change if it is more than `room` bytes, those of `where`. None: it fits."""
    found = take(config)
    lines = [f"memory of a training step, forecast:\n{found.told()}"]
    if config.data.language_every:
        lines.append("vision-language batches, whose words take logits of the whole vocabulary each, are not in it")
    if room is not None and found.total > room:
        lines.append(f"more than the {room / GIB:.1f} GiB {where}: {advice(config, room, take)}")
    return "\n".join(lines)


def advice(config: TrainConfig, room: int, take: Callable[[TrainConfig], Forecast]) -> str:
    """What to change for a run to fit into `room` bytes: settings that leave what is learnt alone before others. take:
    the forecast of a config."""
    changes: dict[str, str] = {}

    def total(changes: Mapping[str, str]) -> float:
        try:
            return take(override(config, " ".join(changes.values()).split())).total
        except ValueError:
            # Settings that this run cannot have, or not together.
            return math.inf

    def told(changes: Mapping[str, str]) -> str:
        return f"{' '.join(changes.values())} makes it {total(changes) / GIB:.1f} GiB"

    for key, change in _savings(config):
        tried = {**changes, key: change}
        found = total(tried)
        if math.isfinite(found):
            changes = tried
        if found <= room:
            break
    else:
        smallest = f"; {told(changes)}" if changes else ""
        freezes = config.family == "xr0" and config.model.train == "all"
        other = "finetune_head, which leaves the VLM alone, or " if freezes else ""
        return f"no setting makes it fit{smallest}: take {other}more processes"
    # Without those that were not what it took; recomputing stays rather than small batches, which cost more time.
    for key in list(changes)[-2::-1]:
        fewer = {other: change for other, change in changes.items() if other != key}
        if total(fewer) <= room:
            changes = fewer
    return told(changes)


def room_of(device: torch.device) -> int:
    """Bytes of a device's memory that a run may have; of a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory - ON_A_GPU
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _savings(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(what of, change), one after the other, the earlier ones kept; a later one of the same stands for it."""
    model, batch, accumulate = config.model, config.data.batch_size, config.optim.accumulate
    sees = not config.lora.rank or not {"vision", "projector"}.isdisjoint(config.lora.targets)
    if model.train != "head" and sees and not model.checkpoint_activations:
        yield "activations", "model.checkpoint_activations=true"
    if model.train != "head" and not model.checkpoint_language:
        yield "language", "model.checkpoint_language=true"
    while batch > 1 and batch % 2 == 0:
        batch, accumulate = batch // 2, accumulate * 2
        yield "batch", f"data.batch_size={batch} optim.accumulate={accumulate}"
    if config.optim.moments != "8bit":
        yield "moments", "optim.moments=8bit"
    if model.train == "all" and not config.lora.rank:
        yield "lora", "lora.rank=16"
    if model.train == "head" and not model.offload_frozen:
        yield "offload", "model.offload_frozen=true"
    if model.train == "all" and not model.offload_frozen:
        yield "language", "model.checkpoint_language=true model.offload_frozen=true"


class _Account:
    """What is held while a policy's step is traced, by part."""

    def __init__(
        self,
        policy: Policy,
        dtype: torch.dtype,
        whole: set[nn.Parameter],
        optim: OptimConfig,
        processes: int,
    ) -> None:
        self._dtype, self._processes = dtype, processes
        self._frozen = self._trained = self._moments = self._work = self._gradients = 0
        in_8bit = optim.moments == "8bit"
        shared = [p for p in policy.parameters() if p not in whole]
        for parameter in policy.parameters():
            shard = self._shard(parameter)
            if parameter in whole:
                self._frozen += parameter.numel() * dtype.itemsize
            elif parameter.requires_grad:
                self._trained += self._share(parameter)
                self._moments += moment_bytes(shard) if in_8bit else 2 * self._share(parameter)
                self._work = max(self._work, work_bytes(shard) if in_8bit else 0)
            else:
                self._frozen += self._share(parameter)
        self._copies = sum(p.numel() for p in shared) * dtype.itemsize
        self._accumulates = optim.accumulate > 1
        if self._accumulates:
            # Of the micro-batches before.
            self._gradients = self._trained
        self._average = self._trained if optim.average else 0
        self.most = Forecast(*[0] * 7)

    def follow(self, policy: Policy) -> None:
        """policy: as it is traced."""
        self.ledger = Ledger([*policy.parameters(), *policy.buffers()], self.check)
        own = [list(module.parameters()) for module in own_groups(policy)]
        grouped = {parameter for group in own for parameter in group}
        whole = frozen_whole(policy)
        root = [p for p in policy.parameters() if p not in grouped and p not in whole]
        for group in (*own, root):
            learning = [p for p in group if p.requires_grad]
            self._follow(learning, sum(p.numel() for p in group))

    def _follow(self, group: list[nn.Parameter], gathered: int) -> None:
        """Its gradients, when all are there, become float32 and the process's own; its copies go."""
        missing = {id(p) for p in group}

        def done(parameter: torch.Tensor) -> None:
            parameter.grad = None
            missing.discard(id(parameter))
            self._gradients += parameter.numel() * self._dtype.itemsize
            self.check()
            if missing:
                return
            elements = sum(p.numel() for p in group)
            is_copied = self._processes > 1 or self._dtype.itemsize != MASTER
            # What is sent to the others.
            sent = elements * MASTER if is_copied else 0
            received = sum(map(self._share, group)) if self._processes > 1 else 0
            self._gradients += sent + received
            self.check()
            kept = 0 if self._accumulates else sum(map(self._share, group))
            self._gradients += kept - sent - received - elements * self._dtype.itemsize
            self._copies -= gathered * self._dtype.itemsize

        for parameter in group:
            parameter.register_post_accumulate_grad_hook(done)

    def _shard(self, parameter: torch.Tensor) -> torch.Size:
        """Of a process: whole rows."""
        return torch.Size([-(-parameter.shape[0] // self._processes), *parameter.shape[1:]])

    def _share(self, parameter: torch.Tensor) -> int:
        """Bytes of a process's shard, float32."""
        return self._shard(parameter).numel() * MASTER

    def optimize(self) -> None:
        """The optimiser's step, behind the backward pass."""
        self.check(self._work)

    def check(self, besides: int = 0) -> None:
        """Whether it has become the most. besides: bytes that are there as well."""
        now = Forecast(
            self._frozen,
            self._trained,
            self._moments,
            self._average,
            self._copies,
            self._gradients,
            self.ledger.live + besides,
        )
        if now.total > self.most.total:
            self.most = now


def _draw(config: TrainConfig, batch: RobotBatch) -> FlowDraw:
    """The longest prefix: its chunks are generated too, if errors weigh."""
    rows = config.flow.repeat * len(batch.actions)
    prefix = longest_prefix(config.flow, batch.actions.shape[1])
    noise = batch.actions.new_empty((rows, *batch.actions.shape[1:]))
    hidden = torch.zeros(prefix, dtype=torch.bool, device="cpu")
    return FlowDraw(noise, noise.new_empty(rows), prefix, hidden)
