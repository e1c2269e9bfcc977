"""A CUDA graph as an object: warm-up, capture, replay, what is inside, close. It knows no model."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

CAPTURE_MODE = "thread_local"
"""In torch's default mode, a CUDA call of any other thread that could wait, an allocation among them, breaks a capture:
a server decodes and pins images beside the engine. What must not be captured is still refused to the capturing thread.
"""

_capturing = threading.Lock()
"""torch allows a process one capture at a time, and waits for the whole device before each, which breaks another."""


@dataclass(frozen=True)
class GraphContents:
    """What a captured graph holds. nodes: kind (kernel, memcpy, memset, event, ...) -> how many; kernels: name -> how
    many, in the order of their first launch."""

    nodes: dict[str, int]
    kernels: dict[str, int]


class Graph:
    """Work on static buffers, captured once and replayed: the host then launches one thing.

    work: launches everything on the current stream (and on streams that it forks from it and joins to it, whatever it
    raises), allocates nothing the second time, and waits for nothing. It is run once before it is captured, so that
    kernels are compiled and libraries have what they allocate. The buffers are their owner's to keep until close.
    """

    def __init__(self, work: Callable[[], None], device: torch.device, name: str = "graph") -> None:
        if device.type != "cuda":
            raise NotImplementedError(f"{name}: CUDA graphs need a CUDA GPU, not {device}; run the work itself")
        self.name, self.device = name, device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Around the capture too: torch leaves its stream the current one where the capture fails.
        with torch.cuda.stream(stream):
            try:
                work()
            finally:
                # Nobody else waits for this stream, and after a failure the buffers may be written anew, or freed.
                stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with _undisturbed(), torch.cuda.graph(graph, stream=stream, capture_error_mode=CAPTURE_MODE):
                work()
        graph.instantiate()
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._replayed_on: torch.cuda.Stream | None = None

    def replay(self) -> None:
        """Launch it on the current stream. Raises RuntimeError after close."""
        if self._graph is None:
            raise RuntimeError(f"{self.name}: the graph was closed")
        self._replayed_on = torch.cuda.current_stream(self.device)
        self._graph.replay()

    def contents(self) -> GraphContents:
        """Read the captured graph back. Needs cuda-bindings (of the extra `cuda`)."""
        if self._graph is None:
            raise RuntimeError(f"{self.name}: the graph was closed")
        return read_contents(self._graph.raw_cuda_graph())

    def close(self) -> None:
        """Free the graph once its last replay has ended; replay is refused afterwards."""
        # A replay is ordered behind the one before it, on whatever stream that was.
        if self._replayed_on is not None:
            self._replayed_on.synchronize()
        self._graph = self._replayed_on = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Within, no other graph is captured, and no garbage is collected."""
    with _capturing:
        collects = gc.isenabled()
        # Triton unloads the kernels that are collected: a call that breaks the capture of its thread.
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def wait_for_stream(device: torch.device) -> None:
    """Wait for what a GPU's current stream holds: not for the device, which would break a capture on another stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def read_contents(raw_graph: int) -> GraphContents:
    """raw_graph: address of a cudaGraph_t. Raises RuntimeError for what the driver refuses."""
    from cuda.bindings import driver

    graph = driver.CUgraph(raw_graph)
    count = _checked(driver.cuGraphGetNodes(graph))[1]
    nodes = _checked(driver.cuGraphGetNodes(graph, count))[0] if count else []
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for node in nodes:
        kind = _checked(driver.cuGraphNodeGetType(node))[0]
        kinds[kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()] += 1
        if kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            kernels[_kernel_name(_checked(driver.cuGraphKernelNodeGetParams(node))[0])] += 1
    return GraphContents(dict(kinds), dict(kernels))


def _kernel_name(parameters: Any) -> str:
    """A node names its kernel by function or, where that was launched from a library, by kernel handle."""
    from cuda.bindings import driver

    if int(parameters.func):
        return _checked(driver.cuFuncGetName(parameters.func))[0].decode()
    return _checked(driver.cuKernelGetName(parameters.kern))[0].decode()


def _checked(result: tuple) -> tuple:  # type: ignore[type-arg]
    """The values of a driver call without its status. Raises RuntimeError for another status than success."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return tuple(values)
