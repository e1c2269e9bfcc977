"""Forms of what came with sm_90: barriers in memory, bulk copies (TMA), clusters of blocks."""

from __future__ import annotations

import re
from functools import cache

from tests.ptx.instructions import Bound, Form
from tests.ptx.parser import split_operands
from tests.ptx.transfers import ACQUIRE, CLUSTER, NO_INCREMENT, RELEASE, SCOPES, address, parts

COMPLETE = r"mbarrier::complete_tx::bytes"
SHARED = r"shared(?:::cta|::cluster)?"
TENSOR_IN = re.compile(
    rf"cp\.async\.bulk\.tensor\.[1-5]d\.(?P<target>{SHARED})\.global(?:\.tile)?\.{COMPLETE}"
    r"(?P<multicast>\.multicast::cluster)?(?P<hint>\.L2::cache_hint)?"
)
TENSOR_OUT = re.compile(
    rf"(?P<op>cp\.async\.bulk|cp\.reduce\.async\.bulk)\.tensor\.[1-5]d\.global\.{SHARED}(?:\.(?P<o>add|min|max|and|or|xor))?"
    r"(?:\.tile)?\.bulk_group(?P<hint>\.L2::cache_hint)?"
)
BULK_IN = re.compile(
    rf"cp\.async\.bulk\.(?P<target>{SHARED})\.(?P<source>global|shared::cta)\.{COMPLETE}"
    r"(?P<multicast>\.multicast::cluster)?(?P<hint>\.L2::cache_hint)?"
)
BULK_OUT = re.compile(rf"cp\.async\.bulk\.global\.{SHARED}\.bulk_group(?P<hint>\.L2::cache_hint)?")
BARRIER = re.compile(
    r"mbarrier\.(?P<op>init|inval|arrive|arrive_drop|expect_tx|complete_tx|test_wait|try_wait|pending_count)"
    r"(?P<modifiers>(?:\.(?:expect_tx|parity|noComplete|acquire|release|relaxed|cta|cluster))*)"
    rf"(?:\.(?P<space>{SHARED}))?\.b64"
)
COPIES_ARRIVE = re.compile(rf"cp\.async\.mbarrier\.arrive(?P<kept>\.noinc)?(?:\.{SHARED})?\.b64")
CLUSTER_BARRIER = re.compile(
    r"barrier\.cluster\.(?P<op>arrive|wait)(?:\.(?P<order>release|relaxed|acquire))?(?:\.aligned)?"
)


@cache
def cluster_form(opcode: str) -> Form | None:
    """The form of a mnemonic of this file's; None if it is none."""
    makers = (
        (BARRIER, _barrier), (TENSOR_IN, _tensor_in), (TENSOR_OUT, _tensor_out), (BULK_IN, _bulk_in),
        (BULK_OUT, _bulk_out), (COPIES_ARRIVE, _copies_arrive), (CLUSTER_BARRIER, _cluster_barrier),
    )  # fmt: skip
    for pattern, make in makers:
        if found := pattern.fullmatch(opcode):
            return make(found)
    if re.fullmatch(r"mapa\.shared::cluster\.u32", opcode):
        return lambda operands: Bound("mapa", ["=n", "n", "n"], operands)
    if re.fullmatch(r"getctarank\.shared::cluster\.u32", opcode):
        return lambda operands: Bound("getctarank", ["=n", "n"], operands)
    return None


def _barrier(match: re.Match[str]) -> Form:
    op, modifiers = match["op"], match["modifiers"].split(".")[1:]
    order = next((each for each in modifiers if each in ("acquire", "release", "relaxed")), None)
    waits, arrives = op in ("test_wait", "try_wait"), op.startswith("arrive")
    flags = CLUSTER if match["space"] == "shared::cluster" else 0
    if waits or arrives:
        flags |= SCOPES[next((each for each in modifiers if each in SCOPES), "cta")]
        flags |= 0 if order == "relaxed" else ACQUIRE if waits else RELEASE
    if "noComplete" in modifiers:
        raise NotImplementedError("with .noComplete")
    name = ".".join(["mbarrier", op, *(each for each in modifiers if each in ("expect_tx", "parity"))])

    def form(operands: tuple[str, ...]) -> Bound:
        if op == "pending_count":
            return Bound("mbarrier.pending_count", ["=n", "w"], operands)
        if waits:
            # What may follow is how long the machine may wait at most.
            base, offset = address(operands[1])
            phase = "n" if "parity" in modifiers else "w"
            return Bound(name, ["=p", "n", phase], [operands[0], base, operands[2]], flags, imm=offset)
        if not arrives:
            base, offset = address(operands[0])
            rest = operands[1:]
            return Bound(name, ["n", *["n"] * len(rest)], [base, *rest], flags, imm=offset)
        # A remote barrier gives no state.
        state = None if operands[0] == "_" else operands[0] if operands[0][0] != "[" else None
        at, *count = operands if operands[0][0] == "[" else operands[1:]
        base, offset = address(at)
        return Bound(name, ["=w", "n", "n"], [state, base, *(count or [None])], flags, imm=offset)

    return form


def _tensor_in(match: re.Match[str]) -> Form:
    flags = CLUSTER if match["target"] == "shared::cluster" else 0

    def form(operands: tuple[str, ...]) -> Bound:
        target, source, barrier, *rest = operands
        if match["hint"]:
            rest.pop()
        tensor, coordinates = _tensor(source)
        mask = rest[0] if match["multicast"] else None
        tokens = [_exact(target), tensor, _exact(barrier), mask, *coordinates]
        roles = ["n", "w", "n", "n", *["n"] * len(coordinates)]
        return Bound("cp.async.bulk.tensor.shared.global", roles, tokens, flags, vec=len(coordinates))

    return form


def _tensor_out(match: re.Match[str]) -> Form:
    reduces = match["op"] != "cp.async.bulk"
    if reduces != bool(match["o"]):
        raise NotImplementedError("of that kind")
    op = f"cp.reduce.async.bulk.tensor.{match['o']}" if reduces else "cp.async.bulk.tensor.global.shared"

    def form(operands: tuple[str, ...]) -> Bound:
        tensor, coordinates = _tensor(operands[0])
        tokens = [tensor, _exact(operands[1]), *coordinates]
        return Bound(op, ["w", "n", *["n"] * len(coordinates)], tokens, vec=len(coordinates))

    return form


def _bulk_in(match: re.Match[str]) -> Form:
    flags = CLUSTER if match["target"] == "shared::cluster" else 0
    inner = match["source"] != "global"

    def form(operands: tuple[str, ...]) -> Bound:
        target, source, size, barrier, *rest = operands
        tokens: list[str | None] = [_exact(target), _exact(source), size, _exact(barrier)]
        if inner:
            return Bound("cp.async.bulk.shared.shared", ["n"] * 4, tokens, flags)
        mask = rest[0] if match["multicast"] else None
        return Bound("cp.async.bulk.shared.global", ["n", "w", "n", "n", "n"], [*tokens, mask], flags)

    return form


def _bulk_out(match: re.Match[str]) -> Form:
    def form(operands: tuple[str, ...]) -> Bound:
        tokens = [_exact(operands[0]), _exact(operands[1]), operands[2]]
        return Bound("cp.async.bulk.global.shared", ["w", "n", "n"], tokens)

    return form


def _copies_arrive(match: re.Match[str]) -> Form:
    def form(operands: tuple[str, ...]) -> Bound:
        base, offset = address(operands[0])
        flags = NO_INCREMENT if match["kept"] else 0
        return Bound("cp.async.mbarrier.arrive", ["n"], [base], flags, imm=offset)

    return form


def _cluster_barrier(match: re.Match[str]) -> Form:
    by_default = "release" if match["op"] == "arrive" else "acquire"
    flags = {"release": RELEASE, "acquire": ACQUIRE, "relaxed": 0}[match["order"] or by_default]
    return lambda operands: Bound(f"barrier.cluster.{match['op']}", flags=flags)


def _tensor(operand: str) -> tuple[str, tuple[str, ...]]:
    """`[map, {c0, c1}]`."""
    tensor, coordinates = split_operands(operand[1:-1])
    return tensor, parts(coordinates)


def _exact(operand: str) -> str:
    """An address that can have no offset here."""
    base, offset = address(operand)
    if offset:
        raise NotImplementedError(f"with the offset of {operand}")
    return base
