"""Scratch memory of split sums: what a captured graph has seen of it stays where it is as long as the graph.

No kernel runs here: a stand-in for a graph notes what its launches are given.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch

import xr0_engine.kernels
from tests.fused.cuda_on_paper import PaperCuda
from tests.fused.test_model import TWO_VIEWS, chunk_inputs, fused_of
from tests.support import load, random_inputs
from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.step.recorder import META, parts_on_meta
from xr0_engine.bench.step.workload import Workload
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.fused import backends
from xr0_engine.fused import session as sessions
from xr0_engine.fused.ops import FusedOps, tactic_key
from xr0_engine.fused.prompts import SessionKey, bucket, session_key
from xr0_engine.fused.session import PARTS, Session
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.kernels.arguments import Tactic, Workspace
from xr0_engine.kernels.launch import recording

OWN = Tactic(block_m=16, block_n=64, block_k=32, split_k=4)
"""Small tiles in many parts: every product takes another amount of scratch memory."""
LIBRARY = Tactic(block_m=16, block_n=64, block_k=32, library=True)
ORDERS = [order[turn:] + order[:turn] for order in (PARTS, PARTS[::-1]) for turn in range(len(PARTS))]
"""Every part comes first in one, last in one, and before and after every other."""


class Scratch:
    """What workspaces handed out: by graph, while it was captured, and the most that was asked of each workspace.

    The tensors are kept, so that no other gets their addresses.
    """

    def __init__(self) -> None:
        self.held: dict[str, list[torch.Tensor]] = {}
        self.most: dict[tuple[Workspace, str], int] = {}
        self.capturing = ""

    def install(self, monkeypatch) -> None:
        for name in ("partials", "counters"):
            monkeypatch.setattr(Workspace, name, self._noting(name, getattr(Workspace, name)))
        scratch = self

        class Noted:
            def __init__(self, work, device, name="graph") -> None:
                work()
                scratch.capturing = name.partition(" ")[0]
                work()
                scratch.capturing = ""

            def replay(self) -> None: ...

            def close(self) -> None: ...

        monkeypatch.setattr(sessions, "Graph", Noted)

    def _noting(self, name, hand_out):
        def noting(workspace: Workspace, elements: int) -> torch.Tensor:
            given = hand_out(workspace, elements)
            self.most[workspace, name] = max(elements, self.most.get((workspace, name), 0))
            if self.capturing:
                self.held.setdefault(self.capturing, []).append(given)
            return given

        return noting

    def clear(self) -> None:
        self.held.clear()
        self.most.clear()

    def expect_alive(self, *workspaces: Workspace) -> None:
        """What graphs hold is what the workspaces hold."""
        alive = {_storage(part) for each in workspaces for part in (each.partials(0), each.counters(0))}
        for part, tensors in self.held.items():
            assert {_storage(tensor) for tensor in tensors} <= alive, f"{part} holds memory that was freed"

    def expect_exact(self, *workspaces: Workspace) -> None:
        """They hold what was asked for, and no more."""
        for each in workspaces:
            assert each.size == (self.most.get((each, "partials"), 0), self.most.get((each, "counters"), 0))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def scratch(monkeypatch) -> Scratch:
    scratch = Scratch()
    scratch.install(monkeypatch)
    return scratch


@pytest.fixture
def nothing_runs(monkeypatch) -> None:
    for module in pkgutil.iter_modules(xr0_engine.kernels.__path__, "xr0_engine.kernels."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "launch") and not module.name.endswith(".launch"):
            monkeypatch.setattr(loaded, "launch", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("scratch") / "tiny"
    init_checkpoint(folder, "tiny")
    return load(folder)


def fused_by_kernels(plain, monkeypatch, tactic: Tactic, table: TacticTable):
    """On a CPU, with graphs, and this tactic where there is a choice."""
    taken = {"attention": OWN, "lambda_attention": OWN}
    monkeypatch.setattr(FusedOps, "default", lambda self, kind, shape, *_: taken.get(kind, tactic))
    fused, model = fused_of(plain)
    fused.backend, fused.graphs, fused.table = "triton", True, table
    return fused, model


def measured(plain, batch: int) -> dict[str, Tactic]:
    """So that a chain of kernels asks for more than the one kernel, in which every stage has its default."""
    head = plain.config.head
    shape = (batch * (head.context + head.action_length), 2 * head.intermediate_size, head.hidden_size)
    return {tactic_key("swiglu", shape, torch.float32): replace(OWN, split_k=16)}


@pytest.mark.parametrize(
    ("tactic", "table", "words"),
    [
        pytest.param(OWN, TacticTable(""), 5, id="chained, short prompt"),
        pytest.param(LIBRARY, TacticTable(""), 70, id="library, long prompt"),
        pytest.param(OWN, TacticTable("", flow="persistent"), 70, id="persistent, long prompt"),
        pytest.param(OWN, TacticTable("", overlap=True, flow="persistent"), 5, id="overlap, short prompt"),
    ],
)
def test_parts_captured_in_any_order_keep_their_scratch(
    plain, monkeypatch, scratch, nothing_runs, tactic, table, words
):
    fused, model = fused_by_kernels(plain, monkeypatch, tactic, replace(table, tactics=measured(plain, 2)))
    PaperCuda().install(monkeypatch)
    monkeypatch.setattr(Session, "overlapped", table.overlap)
    inputs = random_inputs(model.config, [TWO_VIEWS] * 2, [[3, 2, words], [1, 2, 9]], 4)
    for order in ORDERS:
        session = Session(fused, session_key(inputs), inputs)
        scratch.clear()
        for part in order:
            session.graph(part)
        assert set(scratch.held) == set(PARTS)
        scratch.expect_alive(session.ops.workspace, session.flow_ops.workspace)
        scratch.expect_exact(session.ops.workspace, session.flow_ops.workspace)


@pytest.mark.parametrize("arch", [89, 90, 120])
@pytest.mark.parametrize("case", ["libero", "bimanual"])
def test_published_sizes_keep_their_scratch(monkeypatch, scratch, case, arch):
    """Default tactics of a chip, on paper. A few layers ask for what all do."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    config, work = Workload.of_case(Setup(CASES[case], "4b"))
    parts = parts_on_meta(
        replace(
            config,
            text=replace(config.text, num_layers=3),
            vision=replace(config.vision, depth=2, deepstack_layers=(0, 1)),
            head=replace(config.head, num_layers=2, flow_steps=2),
        )
    )
    parts.backend, parts.graphs = "triton", True
    monkeypatch.setattr(parts, "ops", lambda table: FusedOps("triton", META, table.tactics, arch))
    columns = config.vision.frame_dim
    key = SessionKey(work.batch, work.grids, columns, bucket(work.tokens), (), work.chunk_length)
    for first in PARTS:
        session = Session(parts, key, None)
        scratch.clear()
        with recording():
            for part in sorted(PARTS, key=lambda part: part != first):
                session.graph(part)
        scratch.expect_alive(session.ops.workspace, session.flow_ops.workspace)
        scratch.expect_exact(session.ops.workspace, session.flow_ops.workspace)


@pytest.mark.parametrize("traced_first", [False, True], ids=["replayed first", "traced first"])
@pytest.mark.parametrize("flow", ["chained", "persistent"])
def test_a_traced_flow_leaves_the_captured_one_its_scratch(
    plain, monkeypatch, scratch, nothing_runs, flow, traced_first
):
    fused, model = fused_by_kernels(plain, monkeypatch, OWN, TacticTable("", measured(plain, 1), flow=flow))
    inputs = random_inputs(model.config, [TWO_VIEWS], [[3, 2, 5]], 4)
    kv = model.prefill(inputs, model.encode_images(inputs))
    for trace in ([], None) if traced_first else (None, []):
        fused.sample(kv, inputs.state, *chunk_inputs(inputs, model.config, 1), trace)
    (kept,) = fused._flows._values.values()
    assert set(scratch.held) == {"flow"}
    scratch.expect_alive(kept._ops.workspace)


def test_what_was_reserved_never_grows():
    workspace = Workspace(torch.device("cpu"))
    workspace.partials(8)
    workspace.reserve(16, 2)
    place = workspace.partials(16).data_ptr(), workspace.counters(2).data_ptr()
    workspace.reserve(4, 1)
    for ask in (lambda: workspace.partials(17), lambda: workspace.counters(3), lambda: workspace.reserve(16, 3)):
        with pytest.raises(RuntimeError, match="cannot grow"):
            ask()
    assert (workspace.partials(16).data_ptr(), workspace.counters(2).data_ptr()) == place


@pytest.mark.gpu
def test_a_graph_gets_no_scratch_that_may_be_replaced():
    workspace = Workspace(torch.device("cuda"))
    workspace.partials(8)
    with pytest.raises(RuntimeError, match="not reserved"):
        sessions.Graph(lambda: workspace.partials(8), workspace.device)
    workspace.reserve(8, 1)
    sessions.Graph(lambda: workspace.partials(8).zero_(), workspace.device).close()
