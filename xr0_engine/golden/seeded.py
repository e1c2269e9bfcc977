"""Action heads of published sizes, of weights and inputs that a script makes from seeds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from xr0_engine.comparison import FLOAT32_SEEDED_MAX_ERROR, Comparison, compare
from xr0_engine.config import ActionHeadConfig, ModelConfig
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import Flow, FusedOps
from xr0_engine.fused.prompts import bucket
from xr0_engine.fused.session import FlowSession
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.golden.cases import load_case
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import pack_linears
from xr0_engine.model.weights import head_shapes
from xr0_engine.sizes import published_config, published_xr1_config
from xr0_engine.types import KVBlock


@dataclass(frozen=True)
class Mode:
    """How a released code runs the head. config: of the published sizes; the rest in place of what it says there."""

    config: Callable[[], ModelConfig]
    local_window: int | None
    position_offset: int
    state_length: int

    def head(self) -> ActionHeadConfig:
        return replace(
            self.config().head,
            local_window=self.local_window,
            position_offset=self.position_offset,
            state_length=self.state_length,
        )


MODES = {
    "windowed": Mode(published_config, 4, 10, 1),
    "full": Mode(published_config, None, 0, 1),
    "post": Mode(published_xr1_config, None, 10, 1),
    "video": Mode(published_xr1_config, None, 0, 4),
}
"""As results are named for them: the first two are XR-0's, the others XR-1's."""
RESULT = re.compile(rf"({'|'.join(MODES)})\.prefix(\d+)\.actions")


@torch.inference_mode()
def verify_seeded(
    path: Path, backend: str, device: torch.device, dtype: torch.dtype, table: TacticTable
) -> Iterator[Comparison]:
    """path: of the script, beside its results. Raises ValueError for results of more than one family, or unknown."""
    results = {
        _told(path, name): expected for name, expected in sorted(load_case(path.with_suffix(".safetensors")).items())
    }
    models = {MODES[mode].config for mode, _ in results}
    if len(models) != 1:
        raise ValueError(f"{path.with_suffix('.safetensors')}: expected results of one model, got {len(models)}")
    published = models.pop()()
    script = _run_script(path)
    inputs = script.inputs()
    keys = torch.stack([key for key, _ in inputs["kv"]]).to(device, dtype)
    values = torch.stack([value for _, value in inputs["kv"]]).to(device, dtype)
    batch, tokens = keys.shape[1], keys.shape[3]
    with torch.device("meta"):
        head = ActionHead(published)
    head.load_state_dict(script.weights(head_shapes(head)), assign=True)
    head.to(device, dtype).requires_grad_(False)
    pack_linears(head)
    for (mode, length), expected in results.items():
        head.config = MODES[mode].head()
        # Of what the script makes, a case may take the first states and steps.
        state, noise = inputs["state"][:, : head.config.state_length], inputs["noise"][:, : expected.shape[1]]
        kv = KVBlock(
            keys=keys,
            values=values,
            mask=torch.ones(batch, tokens, dtype=torch.bool, device=device),
            next_position=torch.full((3, batch), tokens, device=device),
            action_mask=torch.ones_like(noise, device=device),
        )
        prefix = torch.zeros_like(noise)
        prefix[:, :length] = inputs["prefix"][:, :length]
        lengths = torch.full((batch,), length)
        ran = ""
        if backend == "reference":
            actions = head.sample(kv, state, noise, prefix, lengths, head.modulation_table())
        else:
            ops, fused = FusedOps(backend, device, table.tactics, kept=table.kept), FusedHead(head)
            session = FlowSession(fused, ops, batch, bucket(tokens), prefix.shape[1], flow=table.flow)
            actions = session.sample(kv, state, noise, prefix, lengths)
            ran = told_way(table.flow, session.way)
        case = f"{path.stem}.{mode}.prefix{length}"
        yield compare(case, f"actions{ran}", actions, expected, dtype, FLOAT32_SEEDED_MAX_ERROR)


def told_way(asked: Flow, ran: Flow) -> str:
    """What a comparison's name says beside: that the flow ran another way than it was asked to."""
    return "" if ran == asked else f", {ran} flow"


def _told(path: Path, name: str) -> tuple[str, int]:
    """Mode and prefix length of a result. Raises ValueError for a name that says neither."""
    matched = RESULT.fullmatch(name)
    if matched is None:
        raise ValueError(f"{path.with_suffix('.safetensors')}: cannot tell what {name!r} is")
    return matched[1], int(matched[2])


def _run_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
