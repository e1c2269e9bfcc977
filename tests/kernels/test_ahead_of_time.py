"""Kernels compiled for chips that are not here. Those of a step in bfloat16: tests/bench/step/test_compile.py; here is
what else a table of tactics, 8-bit weights or another number of rows makes of them.

They are compiled in a process of its own, since this one may have Triton's interpreter in the compiler's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import torch

from tests.kernels.products import EPS, META_WORKSPACE, meta, meta_float, meta_sums
from tests.kernels.support import ARCHS
from tests.support import ROOT
from xr0_engine.fused.ops import FusedOps
from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    HalfBlock,
    InputNorm,
    Residual,
    StatsOut,
    Tactic,
    Weight,
)
from xr0_engine.kernels.lambda_attention import lambda_attention, lambda_tactic
from xr0_engine.kernels.launch import compile_for, recording, variants
from xr0_engine.kernels.linear import default_tactic, linear, swiglu
from xr0_engine.kernels.qkv import qkv

MAX_REGISTERS = 255


def test_every_variant_fits_the_chip():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", __name__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert {entry["arch"] for entry in compiled} == set(ARCHS)
    too_big = [
        entry
        for entry in compiled
        if entry["shared"] > SHARED_LIMIT[entry["arch"]] or entry["spills"] > 0 or entry["registers"] > MAX_REGISTERS
    ]
    assert too_big == []


def main() -> None:
    compiled = []
    for arch in ARCHS:
        with recording() as launches:
            record_eight_bits(arch)
            record_library_epilogues()
            record_twelve_queries(arch)
            record_flow_loop(arch)
        compiled += [asdict(compile_for(call, arch)) for call in variants(launches)]
    print(json.dumps(compiled, default=str))


def record_eight_bits(arch: int) -> None:
    """A product of a flow step, a prefill's gated layer."""
    run = {"workspace": META_WORKSPACE}
    linear(
        meta(1, 12, 1024),
        Weight(meta(1024, 1024, dtype=torch.float8_e4m3fn), meta_float(1024)),
        meta(1, 12, 1024),
        tactic=default_tactic("linear", 12, 1024, 1024, arch),
        **run,
    )
    swiglu(
        meta(1, 315, 2560),
        Weight(meta(19456, 2560, dtype=torch.int8), meta_float(19456)),
        meta(1, 315, 9728),
        norm=InputNorm(meta_sums(315, 2560), EPS),
        tactic=default_tactic("swiglu", 315, 19456, 2560, arch),
        **run,
    )


def record_library_epilogues() -> None:
    """What follows torch's product of a float32 stream: in the middle of a DiT layer, and before its attention."""
    run = {"tactic": Tactic(32, 64, library=True), "workspace": META_WORKSPACE}
    stream, vector, sums = meta_float(1, 32, 1024), meta_float(1024), meta_sums(32, 1024)
    linear(
        meta(1, 32, 4096),
        Weight(meta(1024, 4096)),
        stream,
        residual=Residual(stream, vector, sums, vector, EPS),
        stats=StatsOut(sums, vector),
        **run,
    )
    heads, tables = meta(1, 8, 32, 128), {name: meta_float(1, 32, 64) for name in ("cos", "sin")}
    qkv(
        stream, Weight(meta(3072, 1024)), heads, heads, heads, bias=meta_float(3072), col_scale=vector,
        norm=InputNorm(sums, EPS, "double_rms"), q_weight=meta_float(128), k_weight=meta_float(128), **tables, **run,
    )  # fmt: skip


def record_twelve_queries(arch: int) -> None:
    """Chunks of 10 actions fill half a tile."""
    own, cache, span = meta(1, 8, 12, 128), meta(1, 8, 315, 128), meta(1, dtype=torch.int32)
    tactic = lambda_tactic((1, 8, 12, 8, 315, 128), arch)
    arguments = (own, own, own, cache, cache, span, span, meta(1, 12, 1024))
    lambda_attention(*arguments, window=4, context=2, tactic=tactic, workspace=META_WORKSPACE)


def record_flow_loop(arch: int) -> None:
    """All steps for a chunk of 30 after 320 tokens, at the published sizes."""
    batch, tokens, layers, steps, columns, inner, heads, dim, actions = 1, 32, 16, 5, 1024, 4096, 8, 128, 32
    chunk, span = (batch, tokens - 2, actions), meta(batch, dtype=torch.int32)

    def half(outputs: int) -> HalfBlock:
        return HalfBlock(*(meta_float(steps, layers, size) for size in (columns, outputs, columns)))

    norms, head_norms = meta_float(layers, columns), meta_float(layers, dim)
    weights = FlowWeights(
        addresses=meta(layers, 4, dtype=torch.int64),
        attention=half(3 * columns),
        mlp=half(2 * inner),
        middle_norms=norms,
        final_norms=norms,
        q_norms=head_norms,
        k_norms=head_norms,
        in_weights=(meta(columns, actions), meta(columns, columns)),
        out_weights=(meta(actions, columns), meta(actions, actions)),
    )
    cache = meta(layers, batch, 8, 320, dim)
    inputs = FlowInputs(
        *(cache, cache, span, span, meta(3, batch, dtype=torch.int32), meta(batch, 1, 32)),
        *(meta_float(*chunk), meta_float(*chunk), span, meta_float(*chunk)),
    )
    stream, sums = meta_float(batch, tokens, columns), meta_sums(tokens, columns)
    own, table = meta(batch, heads, tokens, dim), meta_float(batch, tokens, dim // 2)
    buffers = FlowBuffers(
        *(stream, sums, stream, sums, stream, sums, own, own, own),
        *(meta(batch, tokens, columns), meta(batch, tokens, inner), meta(batch, tokens - 2, columns)),
        *(meta(batch, 1, columns), table, table, meta_float(2, *chunk)),
    )
    FusedOps("triton", torch.device("meta"), arch=arch).flow_loop(
        weights, inputs, buffers, eps=EPS, context=2, window=4
    )


if __name__ == "__main__":
    main()
