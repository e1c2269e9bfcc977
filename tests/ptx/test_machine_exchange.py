"""Exchange among lanes, special registers, control flow of diverging lanes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine_support import LANES, compute, execute, kinds, lanewise

LANE = np.arange(LANES)
FULL = 0xFFFFFFFF


def shuffled(mode: str, values: np.ndarray, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """As PTX describes it, lane by lane: (values, whether the source was within its segment)."""
    clamp, segment = c & 31, c >> 8 & 31
    result, inside = [], []
    for lane in LANE:
        bound = lane & segment | clamp & ~segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lane & segment | b & ~segment}[mode]
        within = source >= bound if mode == "up" else source <= bound
        result.append(values[source if within else lane])
        inside.append(within)
    return np.array(result), np.array(inside)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    values = np.random.default_rng(0).integers(0, 1 << 32, LANES).astype(np.uint32)
    for b in (0, 1, 2, 5, 16, 31):
        for width in (32, 16, 8):
            c = (32 - width) << 8 | (0 if mode == "up" else 31)
            expected, inside = shuffled(mode, values, b, c)
            found = lanewise(f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {b}, {c}, -1;", [values], np.uint32)
            np.testing.assert_array_equal(found, expected)
            marked = lanewise(
                f"shfl.sync.{mode}.b32 %r20|%p1, {{a}}, {b}, {c}, -1; selp.b32 {{d}}, 1, 0, %p1;", [values], np.uint32
            )
            np.testing.assert_array_equal(marked.astype(bool), inside)


@pytest.mark.parametrize("limit", [0, 7, 32])
def test_votes(limit):
    for name, expected in (("all", limit == 32), ("any", limit > 0), ("uni", limit in (0, 32))):
        body = f"setp.lt.u32 %p1, {{a}}, {limit}; vote.sync.{name}.pred %p2, %p1, -1; selp.b32 {{d}}, 1, 0, %p2;"
        found = lanewise(body, [LANE.astype(np.uint32)], np.uint32)
        np.testing.assert_array_equal(found, np.full(LANES, expected))
    found = lanewise(
        f"setp.lt.u32 %p1, {{a}}, {limit}; vote.sync.ballot.b32 {{d}}, %p1, -1;", [LANE.astype(np.uint32)], np.uint32
    )
    np.testing.assert_array_equal(found, np.full(LANES, (1 << limit) - 1, np.uint32))


def test_votes_of_part_of_a_warp():
    found = lanewise(
        "setp.lt.u32 %p3, {a}, 4; setp.lt.u32 %p1, {a}, 2; mov.b32 {d}, 9; @%p3 vote.sync.ballot.b32 {d}, %p1, 15;",
        [LANE.astype(np.uint32)], np.uint32,
    )  # fmt: skip
    np.testing.assert_array_equal(found, [3] * 4 + [9] * 28)


@pytest.mark.parametrize("bits", [32, 64])
def test_matches(bits):
    values = (LANE % 5).astype(f"u{bits // 8}") << (bits - 4)
    found = lanewise(f"match.any.sync.b{bits} {{d}}, {{a}}, -1;", [values], np.uint32)
    expected = [sum(1 << int(other) for other in LANE if values[other] == value) for value in values]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["add.s32", "and.b32", "or.b32", "xor.b32", "min.s32", "max.s32", "min.u32", "max.u32"]
)
def test_reductions(name):
    values = np.random.default_rng(0).integers(0, 1 << 32, LANES).astype(np.uint32)
    of = values.view(np.int32) if name.endswith("s32") else values
    function = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.minimum,
        "max": np.maximum,
    }[name[:3].rstrip(".")]
    found = lanewise(f"redux.sync.{name} {{d}}, {{a}}, -1;", [values], np.uint32)
    np.testing.assert_array_equal(found.view(of.dtype), np.full(LANES, function.reduce(of), of.dtype))


def test_election_and_active_lanes():
    body = "setp.gt.u32 %p1, {a}, 5; mov.b32 {d}, 0; @%p1 activemask.b32 %r20; @%p1 elect.sync %r21|%p2, 0xffffffc0;"
    found = lanewise(f"{body} @%p1 selp.b32 {{d}}, %r20, %r21, %p2;", [LANE.astype(np.uint32)], np.uint32)
    np.testing.assert_array_equal(found, [0] * 6 + [FULL - 63] + [6] * 25)


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.idx.b32 %r20, %r0, 0, 31, -1;",
        "vote.sync.ballot.b32 %r20, %p1, -1;",
        "bar.warp.sync -1;",
        "redux.sync.add.s32 %r20, %r0, -1;",
    ],
    ids=lambda text: text.split(".")[0],
)  # fmt: skip
def test_a_member_mask_names_lanes_that_take_part(instruction):
    """Whole warps do; under a predicate they do not, and a mask that leaves a lane out is wrong too."""
    assert not kinds(execute(f"setp.ge.u32 %p1, %r0, 0; {instruction}"))
    assert kinds(execute(f"setp.lt.u32 %p1, %r0, 4; @%p1 {instruction}")) == {"member-mask"}
    assert kinds(execute(f"setp.ge.u32 %p1, %r0, 0; {instruction.replace('-1', '7')}")) == {"member-mask"}


def test_special_registers():
    out = np.zeros((3 * 2 * 64, 8), np.uint32)
    names = ["tid.x", "ctaid.x", "nctaid.x", "ntid.x", "laneid", "warpid", "lanemask_lt", "lanemask_ge"]
    body = "mad.wide.u32 %d10, %r3, 32, %d0;"
    body += "".join(f"mov.u32 %r20, %{name}; st.global.b32 [%d10+{4 * k}], %r20;" for k, name in enumerate(names))
    compute(body, out, blocks=3, warps=4)
    thread = np.arange(3 * 128)
    tid = thread % 128
    lane = tid % 32
    expected = [
        tid,
        thread // 128,
        0 * tid + 3,
        0 * tid + 128,
        lane,
        tid // 32,
        (1 << lane) - 1,
        FULL - (1 << lane) + 1,
    ]
    np.testing.assert_array_equal(out, np.stack(expected, 1))


def test_lanes_diverge_and_meet():
    """Loops of different length, nested; what a lane does alone, others do not see until they have met again."""
    body = """
    mov.b32 %r10, 0; mov.b32 %r11, %r0;
    OUTER: setp.eq.s32 %p1, %r11, 0; @%p1 bra DONE;
    and.b32 %r12, %r11, 3; add.s32 %r10, %r10, 1;
    INNER: setp.eq.s32 %p2, %r12, 0; @%p2 bra NEXT;
    add.s32 %r10, %r10, 100; sub.s32 %r12, %r12, 1; bra INNER;
    NEXT: sub.s32 %r11, %r11, 1; bra OUTER;
    DONE: shfl.sync.idx.b32 %r13, %r10, 31, 31, -1;
    mad.wide.u32 %d10, %r0, 8, %d0; st.global.v2.b32 [%d10], {%r10, %r13};
    """
    out = np.zeros((LANES, 2), np.uint32)
    compute(body, out)
    expected = [lane + 100 * sum(k & 3 for k in range(lane + 1)) for lane in LANE]
    np.testing.assert_array_equal(out[:, 0], expected)
    np.testing.assert_array_equal(out[:, 1], np.full(LANES, expected[-1]))


def test_lanes_return_one_by_one():
    out = np.zeros(LANES, np.uint32)
    body = """
    mov.b32 %r10, 0; mad.wide.u32 %d10, %r0, 4, %d0;
    LOOP: setp.ge.u32 %p1, %r10, %r0; @%p1 ret;
    add.s32 %r10, %r10, 1; st.global.b32 [%d10], %r10; bra LOOP;
    """
    compute(body, out)
    np.testing.assert_array_equal(out, LANE)
