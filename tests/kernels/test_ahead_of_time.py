"""Kernels compiled for chips that are not here. Those of a step in bfloat16: tests/bench/step/test_compile.py; here is
what else a table of tactics, 8-bit weights or another number of rows makes of them.

They are compiled in a process of its own, since this one may have Triton's interpreter in the compiler's place.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace

import pytest
import torch
import triton

from tests.kernels.products import EPS, META_WORKSPACE, meta, meta_float, meta_sums
from tests.kernels.support import ARCHS
from tests.ptx.parser import Function, parse
from tests.support import ROOT
from xr0_engine.bench.step.recorder import step_calls
from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ActionHeadConfig
from xr0_engine.fused.head import SLOT_COLUMNS
from xr0_engine.fused.ops import FusedOps
from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    TMA_FROM,
    WARPGROUPS_ON,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    HalfBlock,
    InputNorm,
    Residual,
    StatsOut,
    Tactic,
    Weight,
    streamed_rows,
)
from xr0_engine.kernels.lambda_attention import lambda_attention, lambda_tactic
from xr0_engine.kernels.launch import (
    DEPENDENT_LAUNCH_FROM,
    Signature,
    compile_call,
    compile_for,
    recording,
    variants,
)
from xr0_engine.kernels.launch import (
    DTYPES as LAUNCH_DTYPES,
)
from xr0_engine.kernels.linear import PROCESSORS, default_tactic, linear, swiglu
from xr0_engine.kernels.qkv import qkv
from xr0_engine.kernels.quantize import quantize
from xr0_engine.model.quantization import quantized_layers
from xr0_engine.model.weights import inference_shapes
from xr0_engine.sizes import published_config, published_xr1_config

MAX_REGISTERS = 255
ON_THE_STACK = {("_bulk_product", 120): 8, ("_swapped", 120): 8, **{("_streamed_flow", arch): 16 for arch in ARCHS}}
"""Bytes of a thread's stack that no loop over K reads. ptxas 12.9, Triton 3.6's, clears some before each tensor copy. A
gated product of 320 rows puts one word there before a tile's loop and reads it behind it (ptxas of Triton 3.7.1). A
streamed loop keeps there what it reads once a layer or step: 8 with Triton 3.7 on sm_89, up to 16 with 3.6."""

EIGHT_BIT_PRODUCTS = {arch: {"i8": "IMMA", "fp8e4nv": "QMMA"} for arch in ARCHS} | {
    90: {"i8": "IGMMA", "fp8e4nv": "QGMMA"}
}
"""Compute capability -> dtype of both factors -> instruction."""

EVERY_PRODUCT_ON, EVERY_PRODUCT = 120, 11
"""The chip that all products of a step by 8-bit rows are compiled for, and how many there are of each dtype; the others
have one of each."""

LOOPS = ("_flow_loop", "_streamed_flow")
MEMORY = ("ld.", "st.", "atom.", "red.", "cp.async.", "ldmatrix.", "stmatrix.")
"""How instructions begin that read or write memory."""


@pytest.fixture(scope="module")
def compiled():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", __name__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_fits_the_chip(compiled):
    assert {entry["arch"] for entry in compiled} == set(ARCHS)
    too_big = [
        entry
        for entry in compiled
        if entry["shared"] > SHARED_LIMIT[entry["arch"]]
        or entry["spills"] > ON_THE_STACK.get((entry["name"], entry["arch"]), 0)
        or entry["registers"] > MAX_REGISTERS
    ]
    assert too_big == []


def test_products_of_8_bits_are_the_tensor_cores_own(compiled):
    """Not of factors that were converted: by their names in the machine's code."""
    found: dict[tuple[int, str], list[set[str]]] = {}
    for entry in (entry for entry in compiled if "products" in entry):
        found.setdefault((entry["arch"], entry["rows"]), []).append(set(entry["products"]))
    assert found.keys() == {(arch, dtype) for arch in ARCHS for dtype in EIGHT_BIT_PRODUCTS[arch]}
    for (arch, dtype), names in found.items():
        assert names == [{EIGHT_BIT_PRODUCTS[arch][dtype]}] * len(names), (arch, dtype)
        assert len(names) >= (EVERY_PRODUCT if arch == EVERY_PRODUCT_ON else 1)


def test_what_a_streamed_loop_has_the_cache_keep_is_let_go(compiled):
    """Half of every chip's cache has room for the keys and values of XR-0, of XR-1's layers the largest alone."""
    loops = [entry for entry in compiled if entry["name"] == "_streamed_flow"]
    keeping = [entry["arch"] for entry in loops if "ld.global.L1::evict_last.L2::cache_hint" in entry["ptx"]]
    assert sorted(keeping) == sorted([*ARCHS, 120])
    assert [entry["arch"] for entry in loops if "applypriority.global.L2::evict_normal" in entry["ptx"]] == keeping


def test_who_waits_for_the_grid_reads_and_does_nothing_else(compiled):
    """Then its program's threads meet, before any of them touches memory."""
    loops = [(entry["arch"], entry["name"], parse(entry["ptx"])) for entry in compiled if entry["name"] in LOOPS]
    assert sorted(arch for arch, *_ in loops) == sorted([*ARCHS] * 2 * len(LOOPS)), "one of each family"
    for _, name, loop in loops:
        statements = loop.statements
        waits = [place for place, statement in enumerate(statements) if orders(statement.opcode) == {"acquire"}]
        arrivals = [place for place, statement in enumerate(statements) if orders(statement.opcode) == {"release"}]
        # Of a streamed loop, programs without a tile of the attention have a wait of their own.
        assert len(waits) == len(arrivals) + (name == "_streamed_flow") > 1
        for place in waits:
            first, last = innermost_loop(loop, place)
            opcodes = [statement.opcode for statement in statements[first : last + 1]]
            assert opcodes == ["ld.acquire.gpu.global.b32", "setp.lt.s32", "bra"]
            assert touches(loop, range(last + 1, len(statements))) == "bar.sync"
        for place in arrivals:
            assert touches(loop, range(place - 1, 0, -1)) == "bar.sync"


def orders(opcode: str) -> set[str]:
    return {"acquire", "release", "acq_rel"} & set(opcode.split("."))


def innermost_loop(function: Function, place: int) -> tuple[int, int]:
    """First and last statement of the smallest loop that it is in."""
    statements = function.statements
    branches = (each for each in range(place, len(statements)) if statements[each].opcode.startswith("bra"))
    loops = [(statements[each].target, each) for each in branches if statements[each].target <= place]
    return min(loops, key=lambda loop: loop[1] - loop[0])


def touches(function: Function, places: range) -> str:
    """The first of these statements that is a barrier of the block or touches memory."""
    opcodes = (function.statements[place].opcode for place in places)
    return next(opcode for opcode in opcodes if opcode == "bar.sync" or opcode.startswith(MEMORY))


def main() -> None:
    compiled = []
    for arch in ARCHS:
        with recording() as launches:
            record_eight_bits(arch)
            record_eight_bit_rows(arch)
            if arch == EVERY_PRODUCT_ON:
                record_every_product(arch)
            record_library_epilogues()
            record_twelve_queries(arch)
            for config in (published_config(), published_xr1_config()):
                record_flow_loops(arch, config.head)
            if arch >= TMA_FROM:
                record_tma(arch)
            record_swapped(arch)
        for call in variants(launches):
            entry = asdict(compile_for(call, arch))
            if call.name in LOOPS:
                # A second time from Triton's cache.
                entry["ptx"] = compile_call(call, Signature(call, arch >= DEPENDENT_LAUNCH_FROM), arch).asm["ptx"]
            product = call.arguments.get("product")
            if product is not None and product.x_scale is not None:
                cubin = compile_call(call, Signature(call, arch >= DEPENDENT_LAUNCH_FROM), arch).asm["cubin"]
                entry |= {"rows": LAUNCH_DTYPES[product.x.dtype], "products": products_of(cubin)}
            compiled.append(entry)
    print(json.dumps(compiled, default=str))


def products_of(cubin: bytes) -> list[str]:
    """Names of the instructions that multiply matrices, read by the nvdisasm that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"\b[A-Z]+MMA\b", text)))


def record_eight_bit_rows(arch: int) -> None:
    """A prefill's gated layer in int8, a vision block's last product in float8, and what comes before each."""
    run = {"workspace": META_WORKSPACE}
    x, scale = meta(1, 194, 2560, dtype=torch.int8), meta_float(1, 194)
    quantize(meta(1, 194, 2560), x, scale, norm=InputNorm(meta_sums(194, 2560), EPS), col_scale=meta(2560))
    swiglu(
        x, Weight(meta(19456, 2560, dtype=torch.int8), meta_float(19456)), meta(1, 194, 9728), x_scale=scale,
        tactic=default_tactic("swiglu", 194, 19456, 2560, arch, factor_bytes=1), **run,
    )  # fmt: skip
    x, scale = meta(1, 512, 4096, dtype=torch.float8_e4m3fn), meta_float(1, 512)
    quantize(
        meta(1, 512, 4096), x, scale, norm=InputNorm(meta_sums(512, 4096), EPS, "layer"), col_scale=meta(4096),
        bias=meta(4096),
    )  # fmt: skip
    linear(
        x, Weight(meta(1024, 4096, dtype=torch.float8_e4m3fn), meta_float(1024)), meta(1, 512, 1024), x_scale=scale,
        bias=meta(1024), residual=Residual(meta(1, 512, 1024)), stats=StatsOut(meta_sums(512, 1024), centred=True),
        tactic=default_tactic("linear", 512, 1024, 4096, arch, factor_bytes=1), **run,
    )  # fmt: skip


def record_every_product(arch: int) -> None:
    """The VLM's layers that a recipe rounds rows for, in both dtypes, with what follows each of them in a step."""
    config, ops = published_config(), {"linear": linear, "swiglu": swiglu, "qkv": qkv}
    layers = quantized_layers("int8", inference_shapes(config))
    calls = step_calls(config, Workload(grids=((16, 16),) * 2, tokens=194, chunk_length=10))
    for call in (call for call in calls if layers.get(call.layer) == "int8"):
        x, weight, *rest = call.arguments
        rows, n, k = call.shape[:3]
        # A norm is in the rows before they are rounded.
        before = ("norm", "col_scale", "x_scale", "tactic", "workspace")
        options = {name: value for name, value in call.options.items() if name not in before}
        for dtype in (torch.int8, torch.float8_e4m3fn):
            data = meta(*weight.data.shape, dtype=dtype)
            ops[call.kind](
                meta(*x.shape, dtype=dtype), Weight(data, meta_float(n)), *rest, **options,
                x_scale=meta_float(*x.shape[:2]), workspace=META_WORKSPACE,
                tactic=default_tactic(call.kind, rows, n, k, arch, factor_bytes=1),
            )  # fmt: skip


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


def record_tma(arch: int) -> None:
    """Prefill of 194 and 315 rows, vision of 512: a wave of all processors, the tiles that are left shared out."""
    narrow = Tactic(256, 64, 64, PROCESSORS[arch], 8, 4 if arch == 90 else 3, schedule="tma")
    wide = replace(narrow, block_n=128, block_m=256 if arch == 90 else 128)
    run = {"workspace": META_WORKSPACE}
    for rows in (194, 315):
        norm, residual = InputNorm(meta_sums(rows, 2560), EPS), Residual(meta(1, rows, 2560))
        heads, keys = meta(1, 32, rows, 128), meta(1, 8, rows, 128)
        tables = {name: meta_float(1, rows, 64) for name in ("cos", "sin")}
        qkv(
            meta(1, rows, 2560), Weight(meta(6144, 2560)), heads, keys, keys, norm=norm, q_weight=meta_float(128),
            k_weight=meta_float(128), **tables, tactic=wide, **run,
        )  # fmt: skip
        for tactic, inputs in ((narrow, 4096), (wide if arch == 90 else narrow, 9728)):
            linear(
                meta(1, rows, inputs), Weight(meta(2560, inputs)), meta(1, rows, 2560), residual=residual,
                stats=StatsOut(meta_sums(rows, 2560)), tactic=tactic, **run,
            )  # fmt: skip
        swiglu(
            meta(1, rows, 2560), Weight(meta(19456, 2560)), meta(1, rows, 9728), norm=norm,
            tactic=replace(narrow, block_n=64 if arch == 90 else 32), **run,
        )  # fmt: skip
    layer_norm = InputNorm(meta_sums(512, 1024), EPS, "layer", meta_float(4096))
    linear(
        meta(1, 512, 1024), Weight(meta(4096, 1024)), meta(1, 512, 4096), bias=meta(4096), norm=layer_norm,
        activation="gelu_tanh", tactic=replace(narrow, block_m=128), **run,
    )  # fmt: skip


def record_swapped(arch: int) -> None:
    """Prefill of 208 and 320 rows, vision of 512 and 960: whole tiles, tiles that are cut evenly, and anywhere."""
    run = {"workspace": META_WORKSPACE}
    # Ada's and Blackwell's shared memory holds three blocks of 32.
    whole = Tactic(256, 128, 32, 1, 8, 3, schedule="swapped")
    if arch == WARPGROUPS_ON:
        whole = Tactic(256, 128, 64, 1, 8, 4, schedule="warpgroups")
    for rows in (208, 320):
        norm, residual = InputNorm(meta_sums(rows, 2560), EPS), Residual(meta(1, rows, 2560))
        heads, keys = meta(1, 32, rows, 128), meta(1, 8, rows, 128)
        tables = {name: meta_float(1, rows, 64) for name in ("cos", "sin")}
        for split in (1, 96, PROCESSORS[arch]):
            qkv(
                meta(1, rows, 2560), Weight(meta(6144, 2560)), heads, keys, keys, norm=norm,
                q_weight=meta_float(128), k_weight=meta_float(128), **tables, tactic=replace(whole, split_k=split),
                **run,
            )  # fmt: skip
        for split, inputs in ((100, 4096), (120, 9728)):
            linear(
                meta(1, rows, inputs), Weight(meta(2560, inputs)), meta(1, rows, 2560), residual=residual,
                stats=StatsOut(meta_sums(rows, 2560)), tactic=replace(whole, split_k=split), **run,
            )  # fmt: skip
        for split in (1, PROCESSORS[arch]):
            swiglu(
                meta(1, rows, 2560), Weight(meta(19456, 2560)), meta(1, rows, 9728), norm=norm,
                tactic=replace(whole, block_n=64, split_k=split), **run,
            )  # fmt: skip
    for rows in (512, 960):
        layer_norm = InputNorm(meta_sums(rows, 1024), EPS, "layer", meta_float(4096))
        linear(
            meta(1, rows, 1024), Weight(meta(4096, 1024)), meta(1, rows, 4096), bias=meta(4096), norm=layer_norm,
            activation="gelu_tanh", tactic=replace(whole, block_m=128), **run,
        )  # fmt: skip
        linear(
            meta(1, rows, 4096), Weight(meta(1024, 4096)), meta(1, rows, 1024), bias=meta(1024),
            residual=Residual(meta(1, rows, 1024)), stats=StatsOut(meta_sums(rows, 1024), centred=True),
            tactic=replace(whole, block_m=128, split_k=PROCESSORS[arch]), **run,
        )  # fmt: skip


def record_twelve_queries(arch: int) -> None:
    """Chunks of 10 actions fill half a tile."""
    own, cache, span = meta(1, 8, 12, 128), meta(1, 8, 315, 128), meta(1, dtype=torch.int32)
    tactic = lambda_tactic((1, 8, 12, 8, 315, 128), arch)
    arguments = (own, own, own, cache, cache, span, span, meta(1, 12, 1024))
    lambda_attention(*arguments, window=4, context=2, tactic=tactic, workspace=META_WORKSPACE)


def record_flow_loops(arch: int, config: ActionHeadConfig) -> None:
    """All steps for a chunk of 30 after 320 tokens, persistent and streamed."""
    batch, tokens, layers, steps = 1, config.context + 30, config.num_layers, config.flow_steps
    columns, inner, heads, dim = config.hidden_size, config.intermediate_size, config.num_heads, config.head_dim
    actions, width = config.action_dim, config.output_hidden_size
    chunk, span = (batch, tokens - config.context, actions), meta(batch, dtype=torch.int32)

    def half(outputs: int) -> HalfBlock:
        return HalfBlock(*(meta_float(steps, layers, size) for size in (columns, outputs, columns)))

    norms = meta_float(layers, columns) if config.stream_norms else None
    head_norms = meta_float(layers, dim)
    weights = FlowWeights(
        addresses=meta(layers, 4, dtype=torch.int64),
        matrices=(),
        attention=half(3 * columns),
        mlp=half(2 * inner),
        middle_norms=norms,
        final_norms=norms,
        q_norms=head_norms,
        k_norms=head_norms,
        in_weights=(meta(columns, actions), meta(columns, columns)),
        out_weights=(meta(width, columns), meta(actions, width)),
    )
    cache = meta(layers, batch, config.num_kv_heads, 320, dim)
    state = meta(batch, config.state_length, config.state_dim)
    inputs = FlowInputs(
        *(cache, cache, span, span, meta(3, batch, dtype=torch.int32), state),
        *(meta_float(*chunk), meta_float(*chunk), span, meta_float(*chunk)),
    )
    stream, sums = meta_float(batch, tokens, columns), meta_float(columns // SLOT_COLUMNS, batch, tokens, 2)
    own, table = meta(batch, heads, tokens, dim), meta_float(batch, tokens, dim // 2)
    buffers = FlowBuffers(
        *(stream, sums, stream, sums, stream, sums, own, own, own),
        *(meta(batch, tokens, columns), meta(batch, tokens, inner), meta(*chunk[:2], columns)),
        *(meta(batch, config.state_length, columns), table, table, meta_float(2, *chunk)),
        *(meta_float(batch, tokens, 3 * columns), None if width == actions else meta(*chunk[:2], width)),
        fragments=meta(streamed_rows(batch * tokens), 4 * columns + inner),
    )
    ops = FusedOps("triton", torch.device("meta"), arch=arch)
    options = {"eps": EPS, "context": config.context, "window": config.local_window}
    ops.flow_loop(weights, inputs, buffers, places=(0, steps * layers), **options)
    ops.streamed_loop(weights, inputs, buffers, steps=(0, steps), **options)


if __name__ == "__main__":
    main()
