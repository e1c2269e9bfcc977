"""wgmma happens at its wait: what must be fenced, kept and waited for around it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_support import SEEDS, SETTINGS, execute, kinds
from tests.ptx.test_machine_products import descriptor

A_BYTES, B_BYTES = 64 * 32, 8 * 32
B_START = 2048
FACTORS = [descriptor(0, 16, 256, 32), descriptor(B_START, 16, 256, 32)]
"""64 x 16 and 8 x 16 of bf16, rows of 32 bytes, swizzled."""
ONES = 0x3F803F80
"""Two ones of bf16."""

FILL = f"shl.b32 %r10, %r0, 2; mov.b32 %r11, {ONES};" + "".join(
    f"st.shared.b32 [%r10+{offset}], %r11;" for offset in range(0, B_START + B_BYTES, 512)
)
PROXY = "fence.proxy.async.shared::cta;"
BARRIER = "bar.sync 0;"
FENCE = "wgmma.fence.sync.aligned;"
SUMS = [f"%r{100 + index}" for index in range(4)]
CLEAR = "".join(f"mov.b32 {name}, 0f3F800000;" for name in SUMS)
COMMIT = "wgmma.commit_group.sync.aligned;"
STORE = "mad.wide.u32 %d10, %r0, 4, %d0; st.global.b32 [%d10], %r100;"


def product(sums: list[str] = SUMS, a: str = "%d20") -> str:
    return f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{', '.join(sums)}}}, {a}, %d21, %p1, 1, 1, 0, 0;"


def product_of_registers(sums: list[str] = SUMS, a: str = "{%r50, %r51, %r52, %r53}") -> str:
    return f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{', '.join(sums)}}}, {a}, %d21, %p1, 1, 1, 0;"


def wait(groups: int = 0) -> str:
    return f"wgmma.wait_group.sync.aligned {groups};"


READY = f"mov.b64 %d20, {FACTORS[0]}; mov.b64 %d21, {FACTORS[1]}; setp.eq.s32 %p1, 0, 0; {FILL} {PROXY} {BARRIER}"


def run(body: str, seed: int = 1, asynchronous: str = "waited") -> tuple[set[str], np.ndarray]:
    out = np.zeros(128, np.float32)
    settings = dataclasses.replace(SETTINGS, seed=seed, asynchronous=asynchronous)
    outcome = execute(body, out, warps=4, shared=B_START + 512, settings=settings)
    assert outcome.status == "finished", outcome
    return kinds(outcome), out


def always(body: str, kind: str | None) -> None:
    for seed in SEEDS:
        for asynchronous in ("waited", "at-once", "random"):
            found, _ = run(body, seed, asynchronous)
            assert found == ({kind} if kind else set()), (seed, asynchronous, found)


def test_in_order():
    for asynchronous in ("waited", "at-once", "random"):
        found, out = run(f"{READY} {CLEAR} {FENCE} {product()} {COMMIT} {wait()} {STORE}", asynchronous=asynchronous)
        assert not found
        np.testing.assert_array_equal(out, np.full(128, 17))


def test_two_products_on_the_same_accumulators_need_nothing_between():
    found, out = run(f"{READY} {CLEAR} {FENCE} {product()} {product()} {COMMIT} {wait()} {STORE}")
    assert not found
    np.testing.assert_array_equal(out, np.full(128, 33))


def test_without_its_wait_the_result_is_not_there():
    found, out = run(f"{READY} {CLEAR} {FENCE} {product()} {COMMIT} {STORE}")
    assert found == {"wgmma-register"}
    np.testing.assert_array_equal(out, np.ones(128))


def test_accumulators_in_flight():
    first = f"{READY} {CLEAR} {FENCE} {product()} {COMMIT}"
    always(f"{first} mov.b32 %r200, %r101; {wait()}", "wgmma-register")
    always(f"{first} mov.b32 %r101, %r200; {wait()}", "wgmma-register")
    always(f"{first} mov.b32 %r200, %r0; {wait()} mov.b32 %r200, %r101;", None)
    # A group that is left open keeps its registers.
    other = [f"%r{120 + index}" for index in range(4)]
    clear = "".join(f"mov.b32 {name}, 0;" for name in other)
    two = f"{READY} {CLEAR} {clear} {FENCE} {product()} {COMMIT} {product(other)} {COMMIT}"
    always(f"{two} {wait(1)} mov.b32 %r200, %r101; {wait()}", None)
    always(f"{two} {wait(1)} mov.b32 %r200, %r121; {wait()}", "wgmma-register")


def test_factors_in_registers_may_be_read_but_not_written_in_flight():
    factors = "".join(f"mov.b32 %r{50 + index}, {ONES};" for index in range(4))
    first = f"{READY} {CLEAR} {factors} {FENCE} {product_of_registers()} {COMMIT}"
    found, out = run(f"{first} mov.b32 %r200, %r51; {wait()} {STORE} mov.b32 %r51, 0;")
    assert not found
    np.testing.assert_array_equal(out, np.full(128, 17))
    always(f"{first} mov.b32 %r51, 0; {wait()} mov.b32 %r200, %r51;", "wgmma-register")


def test_accumulators_of_another_shape_in_flight():
    wide = [*SUMS, *(f"%r{120 + index}" for index in range(4))]
    clear = "".join(f"mov.b32 {name}, 0;" for name in wide)
    second = product(wide).replace("n8k16", "n16k16")
    body = f"{READY} {clear} {FENCE} {product()} {COMMIT} BETWEEN {second} {COMMIT} {wait()}"
    always(body.replace("BETWEEN", wait()), None)
    always(body.replace("BETWEEN", ""), "wgmma-register")


def test_registers_are_fenced():
    always(f"{READY} {CLEAR} {product()} {COMMIT} {wait()}", "wgmma-fence")
    always(f"{READY} {FENCE} {CLEAR} {product()} {COMMIT} {wait()}", "wgmma-fence")
    # Copies of what was there before the fence are what compilers write, and ptxas does away with.
    copies = "".join(f"mov.b32 {name}, %r150;" for name in SUMS)
    always(f"{READY} mov.b32 %r150, 0; {FENCE} {copies} {product()} {COMMIT} {wait()}", None)
    always(f"{READY} {FENCE} mov.b32 %r150, 0; {copies} {product()} {COMMIT} {wait()}", "wgmma-fence")
    again = f"{READY} {CLEAR} {FENCE} {product()} {COMMIT} {wait()} BETWEEN {product()} {COMMIT} {wait()}"
    always(again.replace("BETWEEN", ""), None)
    always(again.replace("BETWEEN", "mov.b32 %r101, 0;"), "wgmma-fence")
    always(again.replace("BETWEEN", f"mov.b32 %r101, 0; {FENCE}"), None)


OVERWRITE = f"st.shared.b32 [%r10+{B_START - 2048}], 0;"


def test_factors_in_shared_memory_are_kept_until_the_wait():
    """Their writer is ordered behind the issue by a barrier, which is not enough."""
    first = f"{READY} {CLEAR} {FENCE} {product()} {COMMIT}"
    always(f"{first} {wait()} {BARRIER} {OVERWRITE}", None)
    always(f"{first} {BARRIER} {OVERWRITE} {BARRIER} {wait()}", "wgmma-operand")
    for seed in SEEDS:
        found, _ = run(f"{first} {wait()} {OVERWRITE}", seed)
        # Where the writer comes first, its store has passed no fence either.
        assert "shared-race" in found or "wgmma-operand" in found, found
        assert found <= {"shared-race", "wgmma-operand", "proxy-fence"}


def test_a_barrier_before_the_wait_orders_no_one_behind_it():
    """The first warp's rows are overwritten by the others, whether it has waited by then or not."""
    first = f"{READY} {CLEAR} {FENCE} {product()} {COMMIT}"
    for seed in SEEDS:
        found, _ = run(f"{first} {BARRIER} {wait()} {OVERWRITE}", seed)
        assert "shared-race" in found or "wgmma-operand" in found, found


def test_factors_overwritten_too_early_change_the_result():
    body = f"{READY} {CLEAR} {FENCE} {product()} {COMMIT} {BARRIER} {OVERWRITE} {BARRIER} {wait()} {STORE}"
    _, out = run(body)
    assert (out != 17).any()
    _, out = run(body, asynchronous="at-once")
    np.testing.assert_array_equal(out, np.full(128, 17))


LATER = f"{CLEAR} {FENCE} {product()} {COMMIT} {wait()}"


@pytest.mark.parametrize("order", [f"{PROXY} {BARRIER}", f"{BARRIER} {PROXY}"], ids=["by the writer", "by the reader"])
def test_the_proxy_is_fenced(order):
    always(READY.replace(f"{PROXY} {BARRIER}", order) + LATER, None)


def test_the_proxy_is_not_fenced():
    always(READY.replace(PROXY, "") + LATER, "proxy-fence")
    # A fence ahead of the writes is none.
    always(READY.replace(FILL, f"{PROXY} {FILL}").replace(f"{PROXY} {BARRIER}", BARRIER) + LATER, "proxy-fence")


def test_copies_are_told_from_stores():
    given = np.full(1024, ONES, np.uint32)
    copies = "shl.b32 %r10, %r0, 4; mad.wide.u32 %d10, %r0, 16, %d0; cp.async.cg.shared.global [%r10], [%d10], 16;"
    copies += "setp.lt.u32 %p2, %r0, 16; @%p2 cp.async.cg.shared.global [%r10+2048], [%d10], 16; cp.async.wait_all;"
    ready = READY.replace(FILL, copies)
    for fence, kind in ((PROXY, set()), ("", {"proxy-fence-copy"})):
        outcome = execute(ready.replace(PROXY, fence) + LATER, given, warps=4, shared=B_START + 512)
        assert kinds(outcome) == kind


def test_factors_nobody_wrote_or_beyond_the_end():
    always(READY.replace(FILL, "shl.b32 %r10, %r0, 2;") + LATER, "shared-unwritten")
    far = READY.replace(str(FACTORS[1]), str(descriptor(B_START + 512, 16, 256, 32)))
    always(far + LATER, "shared-bounds")
