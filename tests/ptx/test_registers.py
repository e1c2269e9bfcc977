"""Registers that share places: lives as they must be, and programs that compute the same as with a place for each."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.decoder import Program, decode
from tests.ptx.registers import READ, WRITE, Accesses, Blocks, Flow, allocate, lives, until_waits
from tests.ptx.settings import Settings

LANES = 32
LEAST_SAVING = 2
"""Places that the random programs below need fewer, by this factor: else the comparison would show nothing."""


def flow(count: int, jumps: dict[int, int], ends: tuple[int, ...] = ()) -> Flow:
    """jumps: instruction -> target, all of them conditional."""
    targets = np.full(count, -1)
    targets[list(jumps)] = list(jumps.values())
    falls = np.ones(count, bool)
    falls[[*ends, count - 1]] = False
    return Flow(targets, falls)


def accesses(*entries: tuple[int, int, int]) -> Accesses:
    return Accesses(*np.array(entries, np.int64).reshape(-1, 3).T)


def test_what_a_loop_carries_lives_through_the_loop():
    """0: write a; 1: read a, write b; 2: read b; 3: back to 1; 4: end."""
    blocks = Blocks(flow(5, {3: 1}))
    first, last, unwritten = lives(blocks, accesses((0, 0, WRITE), (1, 0, READ), (1, 1, WRITE), (2, 1, READ)), 2)
    assert (first.tolist(), last.tolist()) == ([0, 1], [3, 2])
    assert not unwritten.any()


def test_a_predicated_write_ends_no_life():
    """0: write a; 1: write a in some lanes; 2: read a. And what only such a write sets is read from the beginning."""
    blocks = Blocks(flow(3, {}))
    both = READ | WRITE
    first, last, unwritten = lives(blocks, accesses((0, 0, WRITE), (1, 0, both), (1, 1, both), (2, 0, READ)), 2)
    assert (first.tolist(), last.tolist()) == ([0, 0], [2, 1])
    assert unwritten.tolist() == [False, True]


def test_what_both_sides_of_a_branch_need_lives_through_both():
    """0: write a, b; 1: to 4; 2: read a; 3: to 5 always; 4: read b; 5: end."""
    taken = flow(6, {1: 4, 3: 5})
    taken.falls[3] = False
    first, last, _ = lives(Blocks(taken), accesses((0, 0, WRITE), (0, 1, WRITE), (2, 0, READ), (4, 1, READ)), 2)
    assert (first.tolist(), last.tolist()) == ([0, 0], [2, 4])


def test_a_result_has_another_place_than_its_source():
    blocks = Blocks(flow(3, {}))
    touched = accesses((0, 0, WRITE), (1, 0, READ), (1, 1, WRITE), (2, 1, READ), (2, 2, WRITE))
    places, size = allocate(blocks, touched, np.array([128, 128, 128]))
    assert places.tolist() == [0, 128, 0]
    assert size == 256


def test_what_is_read_unwritten_has_a_place_to_itself():
    """So that it shows the machine's poison, whatever ran before and in whichever loop."""
    blocks = Blocks(flow(4, {}))
    touched = accesses((0, 0, READ), (1, 1, WRITE), (2, 1, READ), (3, 2, WRITE))
    places, _ = allocate(blocks, touched, np.array([128, 128, 128]))
    assert places[0] not in places[1:]
    assert places[1] == places[2]


def test_sizes_do_not_mix_and_untouched_registers_have_no_place():
    blocks = Blocks(flow(4, {}))
    touched = accesses((0, 0, WRITE), (1, 1, WRITE), (2, 2, WRITE))
    places, size = allocate(blocks, touched, np.array([256, 4, 128, 128]))
    assert places.tolist() == [256, 0, 128, -1]
    assert size == 512


def test_products_hold_their_registers_until_they_are_waited_for():
    """0: product of register 0; 1: product of 1; 2: wait for the first; 3: wait for all; 4: end; around: 2 again."""
    blocks = Blocks(flow(6, {4: 2}))
    late = until_waits(blocks, {0: [0], 1: [1]}, {2: False, 3: True})
    told = sorted(zip(late.instruction.tolist(), late.register.tolist(), strict=True))
    assert told == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert set(late.kind.tolist()) == {READ | WRITE}


WGMMA = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out)
.reqntid 128
{
	.reg .b32 %r<300>;
	.reg .b64 %rd<9>;
	mov.b64 %rd1, 0;
	FILL
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, %rd1, 1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	LATER
	wgmma.wait_group.sync.aligned 0;
	AFTER
	ret;
}
"""


def test_of_a_product_that_runs_nothing_else_gets_the_places():
    """The factors are not needed by any instruction after the product itself."""
    later = [f"mov.b32 %r{100 + i}, {i};" for i in range(40)]
    text = WGMMA.replace("FILL", "".join(f"mov.b32 %r{i}, 0;" for i in range(8))).replace("LATER", "".join(later))
    text = text.replace("AFTER", "".join(f"mov.b32 %r{200 + i}, %r0;" for i in range(40)))
    program = decode(text)
    written = program.records["written"]
    places = [
        set(program.pool[record["first"] : record["first"] + record["count"]].tolist())
        for record in program.records
    ]  # fmt: skip
    ops = [program.ops[op] for op in program.records["op"]]
    product = ops.index("wgmma.f32.bf16.bf16")
    wait = ops.index("wgmma.wait_group")
    assert written[product] == 4
    held = places[product]
    assert all(not held & places[between] for between in range(product + 1, wait))
    assert any(held & places[after] for after in range(wait + 1, len(ops))), "then they are free again"


class Writer:
    """A random program: loops, branches that lanes take differently, predicated instructions, few values at a time."""

    REGISTERS = 40

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[str] = []
        self.labels = self.predicates = self.counters = 0

    def text(self) -> str:
        self.emit("mov.u32 %lane, %laneid;")
        for register in range(self.REGISTERS):
            # What is written in some lanes alone starts with a value: an unwritten register would be poison in both.
            self.emit(f"mad.lo.s32 %v{register}, %lane, {register + 3}, {self.random.randrange(1000)};")
        self.block(3)
        self.emit("ld.param.b64 %base, [out]; mad.wide.u32 %base, %lane, 4, %base;")
        for register in range(0, self.REGISTERS, 3):
            self.emit(f"st.global.b32 [%base+{128 * register}], %v{register};")
        body = "\n".join(self.lines)
        return f"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out)
.reqntid 32
{{
.reg .b32 %v<{self.REGISTERS}>; .reg .b32 %t<9999>; .reg .b32 %lane; .reg .b32 %c<99>; .reg .b64 %base;
.reg .pred %p<999>;
{body}
ret;
}}
"""

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def value(self) -> str:
        return f"%v{self.random.randrange(self.REGISTERS)}"

    def condition(self) -> str:
        self.predicates += 1
        predicate = f"%p{self.predicates}"
        compared = self.random.choice(("lt", "gt", "ne"))
        self.emit(f"setp.{compared}.s32 {predicate}, {self.value()}, {self.value()};")
        return predicate

    def block(self, depth: int) -> None:
        for _ in range(self.random.randrange(3, 7)):
            kind = self.random.choice(("compute", "compute", "guarded", "branch", "loop") if depth else ("compute",))
            getattr(self, kind)(depth)

    def compute(self, depth: int) -> None:
        """A chain of values that are needed once."""
        chain = [f"%t{self.random.randrange(9999)}" for _ in range(self.random.randrange(1, 5))]
        source = self.value()
        for target in [*chain, self.value()]:
            operation = self.random.choice(("add.s32", "xor.b32", "mul.lo.s32", "max.s32"))
            self.emit(f"{operation} {target}, {source}, {self.value()};")
            source = target

    def guarded(self, depth: int) -> None:
        self.emit(f"@{self.random.choice(('', '!'))}{self.condition()} add.s32 {self.value()}, {self.value()}, 17;")

    def branch(self, depth: int) -> None:
        self.labels += 1
        other, end, predicate = f"$else{self.labels}", f"$end{self.labels}", self.condition()
        self.emit(f"@{predicate} bra {other};")
        self.block(depth - 1)
        self.emit(f"bra.uni {end}; {other}:")
        self.block(depth - 1)
        self.emit(f"{end}:")

    def loop(self, depth: int) -> None:
        """Lanes leave after different numbers of turns."""
        self.labels += 1
        self.counters += 1
        again, counter, predicate = f"$loop{self.labels}", f"%c{self.counters}", f"%p{self.predicates + 1}"
        self.predicates += 1
        self.emit(f"and.b32 {counter}, {self.value()}, 3; {again}:")
        self.block(depth - 1)
        self.emit(f"sub.s32 {counter}, {counter}, 1; setp.ge.s32 {predicate}, {counter}, 0; @{predicate} bra {again};")


def result(program: Program, seed: int) -> np.ndarray:
    out = np.zeros((Writer.REGISTERS, LANES), np.uint32)
    loaded = machine.LoadedProgram(program)
    grid = machine.Grid(loaded, (1, 1, 1), (1, 1, 1), 1, 0, int(out.ctypes.data).to_bytes(8, "little"))
    ranges = [(out.ctypes.data, out.ctypes.data + out.nbytes)]
    outcome = machine.run([grid], ranges, Settings(seed, "waited", 1, 1, 50, "all", 10**8))
    assert (outcome.status, outcome.reports) == ("finished", [])
    return out


@pytest.mark.parametrize("seed", range(25))
def test_programs_with_divergence_compute_the_same(seed):
    text = Writer(seed).text()
    apart, together = decode(text, share_places=False), decode(text)
    assert LEAST_SAVING * together.register_bytes < apart.register_bytes
    assert np.array_equal(result(together, seed), result(apart, seed))
