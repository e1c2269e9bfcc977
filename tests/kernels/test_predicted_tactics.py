"""Every tactic of a table that ships, executed. Tables are predicted for chips that nobody here has, and a tactic that
no test of a kernel has may be among them.

Tiles are the tactic's own, and rows the key's; of weight rows, K and heads there are fewer: a few tiles, and a few
turns of the ring.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import xr0_engine
from tests.kernels.support import DEVICE
from tests.kernels.test_attention import check_attention, check_lambda
from tests.kernels.test_linear import USES, check_linear, check_swiglu
from tests.kernels.test_qkv import USES as QKV_USES
from tests.kernels.test_qkv import check_qkv
from xr0_engine.env import emulated_arch
from xr0_engine.fused.backends import LOOP
from xr0_engine.fused.tactics import predicted_path, read_tactics
from xr0_engine.kernels.arguments import Tactic, Workspace

PATH = predicted_path(Path(xr0_engine.__file__).parent / "tactics", emulated_arch() or 0)
TABLE = read_tactics(PATH).tactics if PATH.is_file() else {}
SKINNY_ROWS = 64
TURNS = 2
"""Blocks of K beyond those that a pipeline has on their way."""


def shape_of(key: str) -> tuple[str, tuple[int, ...]]:
    """(kind, shape) of a table's key."""
    kind, shape = key.split()[:2]
    return kind, tuple(map(int, shape.split("x")))


def small(tactic: Tactic, weights: int, inputs: int, width: int) -> tuple[int, int]:
    """Of a weight (weights, inputs) whose tiles are of width rows: three tiles, and enough of K."""
    depth = tactic.block_k * (tactic.stages + TURNS) * (1 if tactic.schedule == "whole" else min(tactic.split_k, 4))
    return min(weights, 3 * width), inputs if tactic.schedule == "whole" else min(inputs, depth)


@pytest.mark.parametrize("key", TABLE)
def test_what_a_table_names_computes_the_right_thing(key):
    (kind, shape), tactic = shape_of(key), TABLE[key]
    dtype = torch.bfloat16
    if kind == "attention":
        batch, heads, rows, groups, keys, dim = shape
        groups_seen = min(groups, 2)
        seen = batch, heads // groups * groups_seen, rows, groups_seen, keys, dim
        check_attention(seen, dtype, "causal" in key or groups < heads, tactic, Workspace(DEVICE))
    elif kind == "lambda_attention":
        batch, heads, queries, groups, cached, dim = shape
        groups_seen = min(groups, 2)
        check_lambda((batch, heads // groups * groups_seen, queries, groups_seen, cached, dim), dtype, 4, 2, tactic,
                     Workspace(DEVICE))  # fmt: skip
    elif kind == "qkv":
        rows, weights, inputs, dim = shape
        _, k = small(tactic, weights, inputs, dim)
        use = "dit" if rows <= SKINNY_ROWS else "vlm" if dim == 128 else "vision"
        check_qkv((1, rows, k, 3, 1, dim), dtype, tactic, QKV_USES[use])
    elif kind == "swiglu":
        rows, weights, inputs = shape
        columns, k = small(tactic, weights // 2, inputs, tactic.block_n)
        check_swiglu((1, rows, k, columns), "rms", tactic, dtype)
    else:
        rows, weights, inputs = shape
        outputs, k = small(tactic, weights, inputs, tactic.block_n)
        narrow = tactic.block_n < SKINNY_ROWS
        use = "plain" if narrow else "middle of the dit" if rows <= SKINNY_ROWS else "vision fc2"
        check_linear((1, rows, k, outputs), dtype, USES[use], tactic)


@pytest.mark.skipif(not TABLE, reason="needs XR0_EMULATE of a chip that has a table")
def test_there_is_something_to_execute():
    assert len(TABLE) >= 10
    assert not any(key.startswith(LOOP) for key in TABLE), "stages of a loop that the table's flow has not"
