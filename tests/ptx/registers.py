"""Which place in a warp's register file each register has: registers whose values are never needed together share one.

PTX has as many registers as it likes, a persistent kernel 10,000 and more; a place for each would be a megabyte a warp.

Why divergence needs no care of its own: a place has a slot for every lane, and an instruction writes the slots of the
lanes that execute it and no others. Lanes that wait on another path keep their slots whatever is put into the same
place meanwhile, so what a lane can still need is decided by that lane's own path through the program: by the liveness
of one thread. What reads other lanes' slots (shuffles, matrix products, ldmatrix) is executed by those lanes too, who
then stand at the same instruction with the same registers alive. Four rules make it hold:

- A predicated instruction leaves the lanes whose predicate is false as they were: it ends no register's life.
- What an asynchronous product reads and writes is touched up to its wait. Every wait at which a product may still be
  under way counts as reading and writing its registers.
- A result never lies in the place of a source of the same instruction, so that no order of lanes or of results within
  an instruction matters.
- A register that is read on a path that never wrote it has a place to itself, and so shows the machine's poison.

A life is the stretch of the text from its first to its last instruction, with the loops around included: for such
intervals, giving each register the first free place uses the fewest places that there can be.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

READ, WRITE = 1, 2

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Accesses:
    """Who touches what, one entry each. kind: READ, WRITE or both; a write that may leave a lane as it was is both."""

    instruction: Ints
    register: Ints
    kind: Ints


@dataclass(frozen=True)
class Flow:
    """Where control goes. targets: of each instruction's branch, -1 = none; falls: whether it may go on to the next."""

    targets: Ints
    falls: npt.NDArray[np.bool_]


class Blocks:
    """Stretches of instructions that are entered at the first and left at the last."""

    def __init__(self, flow: Flow) -> None:
        count = len(flow.targets)
        jumps = flow.targets >= 0
        leaders = np.zeros(count + 1, bool)
        leaders[0] = True
        leaders[flow.targets[jumps]] = True
        leaders[1:][jumps | ~flow.falls] = True
        self.first: Ints = np.flatnonzero(leaders[:count])
        self.last: Ints = np.append(self.first[1:], count) - 1
        self.of_instruction: Ints = np.cumsum(leaders[:count]) - 1
        self.successors: list[list[int]] = []
        for last in self.last.tolist():
            after = [last + 1] if flow.falls[last] and last + 1 < count else []
            if flow.targets[last] >= 0:
                after.append(int(flow.targets[last]))
            self.successors.append([int(self.of_instruction[place]) for place in after])

    def __len__(self) -> int:
        return len(self.first)


def until_waits(blocks: Blocks, holds: Mapping[int, Sequence[int]], waits: Mapping[int, bool]) -> Accesses:
    """What waits for asynchronous products do to registers.

    holds: instruction -> registers that its product touches until it is done. waits: instruction -> whether nothing is
    under way after it; a wait that lets some go on is taken to let any go on.
    """
    events: dict[int, list[int]] = {}
    for place in sorted((*holds, *waits)):
        events.setdefault(int(blocks.of_instruction[place]), []).append(place)
    entering: list[frozenset[int]] = [frozenset()] * len(blocks)
    touched: dict[int, frozenset[int]] = {}
    unsettled = set(range(len(blocks)))
    while unsettled:
        block = min(unsettled)
        unsettled.remove(block)
        under_way = entering[block]
        for place in events.get(block, ()):
            if place in holds:
                under_way |= frozenset(holds[place])
            else:
                touched[place] = under_way
                under_way = frozenset() if waits[place] else under_way
        for successor in blocks.successors[block]:
            if not under_way <= entering[successor]:
                entering[successor] |= under_way
                unsettled.add(successor)
    pairs = [(place, register) for place, registers in touched.items() for register in registers]
    places, registers = np.array(pairs, np.int64).reshape(-1, 2).T
    return Accesses(places, registers, np.full(len(pairs), READ | WRITE, np.int64))


def lives(blocks: Blocks, accesses: Accesses, count: int) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """(first, last instruction, read before it was written) of each of count registers; last < first: never touched."""
    order = np.lexsort((accesses.kind == WRITE, accesses.instruction))
    instruction, register = accesses.instruction[order], accesses.register[order]
    kind = accesses.kind[order]
    first, last = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
    np.minimum.at(first, register, instruction)
    np.maximum.at(last, register, instruction)
    # Within a block, a register whose first access reads has to come in alive; one that is ever written need not.
    _, heads = np.unique(blocks.of_instruction[instruction] * count + register, return_index=True)
    exposed = heads[kind[heads] & READ > 0]
    written = np.flatnonzero(kind == WRITE)
    needs = _sets(blocks.of_instruction[instruction[exposed]], register[exposed], len(blocks), count)
    makes = _sets(blocks.of_instruction[instruction[written]], register[written], len(blocks), count)
    entering, leaving = needs.copy(), [0] * len(blocks)
    predecessors: list[list[int]] = [[] for _ in range(len(blocks))]
    for block, successors in enumerate(blocks.successors):
        for successor in successors:
            predecessors[successor].append(block)
    unsettled = set(range(len(blocks)))
    queue = [-block for block in unsettled]
    heapq.heapify(queue)
    while queue:
        block = -heapq.heappop(queue)
        if block not in unsettled:
            continue
        unsettled.remove(block)
        alive = 0
        for successor in blocks.successors[block]:
            alive |= entering[successor]
        leaving[block] = alive
        alive = needs[block] | (alive & ~makes[block])
        if alive != entering[block]:
            entering[block] = alive
            for predecessor in predecessors[block]:
                unsettled.add(predecessor)
                heapq.heappush(queue, -predecessor)
    for block in range(len(blocks)):
        for alive, place in ((entering[block], blocks.first[block]), (leaving[block], blocks.last[block])):
            members = _members(alive, count)
            first[members] = np.minimum(first[members], place)
            last[members] = np.maximum(last[members], place)
    unwritten = np.zeros(count, bool)
    unwritten[_members(entering[0], count)] = True
    return first, last, unwritten


def allocate(blocks: Blocks, accesses: Accesses, sizes: npt.NDArray[np.int64]) -> tuple[Ints, int]:
    """(byte offset of each register, bytes of the file); sizes: bytes of each register's place. -1: never touched."""
    first, last, unwritten = lives(blocks, accesses, len(sizes))
    last[unwritten] = len(blocks.of_instruction)
    first[unwritten] = -1
    places, top = np.full(len(sizes), -1, np.int64), 0
    # Sizes do not share places, so that none is ever split; the small ones first keep all of them aligned.
    for size in np.unique(sizes).tolist():
        top = -(-top // size) * size
        members = np.flatnonzero((sizes == size) & (last >= first))
        free: list[int] = []
        taken: list[tuple[int, int]] = []
        for register in members[np.argsort(first[members], kind="stable")].tolist():
            while taken and taken[0][0] < first[register]:
                heapq.heappush(free, heapq.heappop(taken)[1])
            if free:
                place = heapq.heappop(free)
            else:
                place, top = top, top + size
            places[register] = place
            heapq.heappush(taken, (int(last[register]), place))
    return places, top


def _sets(block: Ints, register: Ints, blocks: int, count: int) -> list[int]:
    """Of each block the set of its registers, as the bits of one number."""
    order = np.argsort(block, kind="stable")
    bounds = np.searchsorted(block[order], np.arange(blocks + 1))
    sets = []
    for begin, end in pairwise(bounds):
        bits = np.zeros(count, bool)
        bits[register[order[begin:end]]] = True
        sets.append(int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little"))
    return sets


def _members(numbers: int, count: int) -> Ints:
    data = np.frombuffer(numbers.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(data, count=count, bitorder="little"))
