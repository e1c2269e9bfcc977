"""Processes and shards: plain torch.distributed, FSDP2 with ZeRO-2 semantics, from one process to many nodes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from xr0_engine.training.lora import has_adapters
from xr0_engine.training.model import Policy

TIMEOUT = timedelta(minutes=30)
"""Of one collective: validation and reading data may keep some processes waiting."""


@dataclass(frozen=True)
class World:
    """The processes of a run. io_group: gloo, for checkpoints that are written beside the training."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    io_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on every one."""
        total = values.to(self.device, torch.float64 if self.device.type == "cpu" else torch.float32, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, on every one."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.io_group)
        return gathered

    def barrier(self) -> None:
        dist.barrier(group=self.io_group)


@contextmanager
def world() -> Iterator[World]:
    """The process group that torchrun describes in the environment, or one of this process alone."""
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        with _ended_by_sigterm():
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            io_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert io_group is not None
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh, io_group)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While processes wait for each other to come, in C++, where no handler of Python's runs: SIGTERM ends this one at
    once, as it should if another one has died. Nothing is half written yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Split what learns over the processes, in place: float32 shards of weights, gradients and optimiser state.

    ZeRO-2: gathered once per step, in dtype, and kept until the backward pass has used them. A frozen VLM stays whole,
    in dtype, in every process, and so does what is frozen of a policy with adapters. Gradients are averaged over the
    processes in float32.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in own_groups(policy):
        fully_shard(layer, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
    frozen = _in_dtype(policy, frozen_whole(policy), dtype)
    fully_shard(policy, mesh=mesh, reshard_after_forward=False, mp_policy=precision, ignored_params=frozen)
    register_fsdp_forward_method(policy, "predict")


def own_groups(policy: Policy) -> list[nn.Module]:
    """The layers that are gathered and reduced each for itself; all else that learns is gathered at once."""
    vlm = policy.vlm
    if has_adapters(policy) or not any(p.requires_grad for p in vlm.parameters()):
        return []
    return [*vlm.model.visual.blocks, *vlm.model.language_model.layers]


def frozen_whole(policy: Policy) -> set[nn.Parameter]:
    """What every process has whole: of a policy whose VLM is frozen, or has adapters, all that does not learn."""
    return set() if own_groups(policy) else {p for p in policy.parameters() if not p.requires_grad}


def _in_dtype(policy: Policy, chosen: set[nn.Parameter], dtype: torch.dtype) -> set[nn.Parameter]:
    """Convert these frozen parameters, in place. Returns what they have become."""
    converted: set[nn.Parameter] = set()
    for module in policy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in chosen:
                whole = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                module.register_parameter(name, whole)
                converted.add(whole)
    return converted


def reshard(policy: Policy) -> None:
    """Give a sharded policy its own parameters back, float32, after a forward pass that no backward pass follows: until
    then it has the gathered ones, which the optimiser does not know and a checkpoint must not hold."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
