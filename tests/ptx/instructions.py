"""What each PTX mnemonic is to the machine: an op of cpp/abi.h and the role of every operand. Arithmetic is here, the
rest in transfers.py. A mnemonic is known with all of its modifiers or not at all.

A role is a register's class, `n` up to 32 bits, `w` 64 bits, `p` a predicate, `v` one of the first two whatever the
type; `=` before it is written, `+` read and written. A table's role `t` is the class of the mnemonic's last type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from tests.ptx.parser import SIZES

SIGNED, WIDE = 1, 2
"""Flags of a record, as cpp/abi.h has them; the others are in transfers.py."""


class Bound(NamedTuple):
    """One instruction as the machine has it, registers still by name; None: no operand. size, vec, imm: as abi.h."""

    op: str
    roles: Sequence[str] = ()
    tokens: Sequence[str | None] = ()
    flags: int = 0
    size: int = 0
    vec: int = 1
    imm: int = 0
    imm2: int = 0


Form = Callable[[tuple[str, ...]], Bound]
"""Operands, as written, to the instruction. Raises NotImplementedError for operands that it cannot have."""

INTEGER = r"(?P<t>[bsu](?:16|32|64))"
NUMBER = r"(?P<t>[bsuf](?:16|32|64)|bf16)"
HALF = r"(?:b?f16(?:x2)?)"
FLOAT = rf"(?P<t>f32|f64|{HALF})"
# Only single precision flushes denormals.
FLUSHED = rf"(?:(?P<z>\.ftz)?\.(?P<t>f32)|\.(?P<u>f64|{HALF}))"
ORDER = "eq|ne|lt|le|gt|ge"

TABLE: list[tuple[str, str, str]] = [
    (r"mov\.pred", "mov.pred", "=p p"),
    (rf"mov\.{NUMBER}", "mov.{place}", "=t t"),
    (rf"selp\.{NUMBER}", "selp.{place}", "=t t t p"),
    (r"cvta(?:\.to)?\.global\.u64", "mov.64", "=w w"),
    (r"(?P<o>and|or|xor)\.pred", "{o}.pred", "=p p p"),
    (r"not\.pred", "not.pred", "=p p"),
    (rf"setp\.(?P<o>{ORDER})\.{INTEGER}", "setp.{o}.{unsigned}", "=p t t"),
    (
        rf"setp\.(?P<o>(?:{ORDER}|lt|le|gt|ge)u?|nan|num)(?:(?P<z>\.ftz)?\.(?P<t>f32)|\.(?P<u>f64|b?f16))",
        "setp.{o}{z}.{t}",
        "=p t t",
    ),
    (rf"(?P<o>and|or|xor|add|sub|mul\.lo)\.{INTEGER}", "{o}.{bits}", "=t t t"),
    (r"add\.[su]16x2", "add.16x2", "=n n n"),
    (rf"(?P<o>not|neg)\.{INTEGER}", "{o}.{bits}", "=t t"),
    (r"abs\.(?P<t>s16|s32|s64)", "abs.{t}", "=t t"),
    (rf"mad\.lo\.{INTEGER}", "mad.lo.{bits}", "=t t t t"),
    (rf"shl\.{INTEGER}", "shl.{bits}", "=t t n"),
    (rf"shr\.{INTEGER}", "shr.{unsigned}", "=t t n"),
    (rf"(?P<o>mul\.hi|div|rem|min|max)\.{INTEGER}", "{o}.{t}", "=t t t"),
    (r"(?P<o>mul|mad)\.wide\.(?P<t>[su]16)", "{o}.wide.{t}", "=n n n {n}"),
    (r"(?P<o>mul|mad)\.wide\.(?P<t>[su]32)", "{o}.wide.{t}", "=w n n {w}"),
    (r"mad\.hi\.(?P<t>[su]32)", "mad.hi.{t}", "=n n n n"),
    (r"bfe\.(?P<t>[su](?:32|64))", "bfe.{t}", "=t t n n"),
    (r"bfi\.(?P<t>b32|b64)", "bfi.{bits}", "=t t t n n"),
    (r"(?P<o>popc|clz)\.(?P<t>b32|b64)", "{o}.{bits}", "=n t"),
    (r"brev\.(?P<t>b32|b64)", "brev.{bits}", "=t t"),
    (r"bfind\.(?P<t>[su](?:32|64))", "bfind.{t}", "=n t"),
    (r"prmt\.b32|shf\.[lr]\.(?:wrap|clamp)\.b32|dp4a\.[su]32\.[su]32", "{name}", "=n n n n"),
    (rf"(?P<o>add|sub|mul)(?:\.rn)?{FLUSHED}", "{o}{z}.{t}", "=t t t"),
    (rf"fma\.rn{FLUSHED}", "fma{z}.{t}", "=t t t t"),
    (rf"fma\.rn\.relu\.(?P<t>{HALF})", "fma.relu.{t}", "=n n n n"),
    (rf"(?P<o>neg|abs){FLUSHED}", "{o}{z}.{t}", "=t t"),
    (r"(?P<o>min|max)(?P<z>\.ftz)?(?P<n>\.NaN)?\.(?P<t>f32)", "{o}{n}{z}.{t}", "=t t t"),
    (rf"(?P<o>min|max)(?P<n>\.NaN)?\.(?P<t>f64|{HALF})", "{o}{n}.{t}", "=t t t"),
    (r"div\.(?:full|approx|rn)(?P<z>\.ftz)?\.(?P<t>f32)|div\.rn\.(?P<u>f64)", "div{z}.{t}", "=t t t"),
    (
        r"(?P<o>sqrt|rcp)\.(?:approx|rn)(?P<z>\.ftz)?\.(?P<t>f32)|(?P<p>sqrt|rcp)\.rn\.(?P<u>f64)",
        "{o}{z}.{t}",
        "=t t",
    ),
    (r"(?P<o>rsqrt|ex2|lg2|sin|cos)\.approx(?P<z>\.ftz)?\.(?P<t>f32)", "{o}{z}.{t}", "=t t"),
    # Their denormals are kept as well, which .ftz of bfloat16 does not change within the rounding of the result.
    (rf"ex2\.approx(?:\.ftz)?\.(?P<t>{HALF})", "ex2.{t}", "=n n"),
    (rf"tanh\.approx\.(?P<t>f32|{HALF})", "tanh.{t}", "=n n"),
    (r"copysign\.(?P<t>f32|f64)", "copysign.{t}", "=t t t"),
    (r"(?P<o>add|sub|mul)(?:\.rn)?\.f32x2", "{o}.f32x2", "=w w w"),
    (r"fma\.rn\.f32x2", "fma.f32x2", "=w w w w"),
    (r"(?P<o>add|sub)(?:\.rn)?\.f32\.(?P<t>b?f16)", "{o}.f32.{t}", "=n n n"),
    (r"fma\.rn\.f32\.(?P<t>b?f16)", "fma.f32.{t}", "=n n n n"),
    (r"activemask\.b32", "activemask", "=n"),
    (r"bar\.warp\.sync", "bar.warp.sync", "n"),
    (r"match\.any\.sync\.(?P<t>b32|b64)", "match.any.{bits}", "=n t n"),
    (r"redux\.sync\.(?P<o>add|and|or|xor)\.[bsu]32", "redux.{o}.32", "=n n n"),
    (r"redux\.sync\.(?P<o>min|max)\.(?P<t>[su]32)", "redux.{o}.{t}", "=n n n"),
    (r"vote\.sync\.(?P<o>all|any|uni)\.pred", "vote.{o}", "=p p n"),
    (r"vote\.sync\.ballot\.b32", "vote.ballot", "=n p n"),
    (r"ret(?:\.uni)?|exit", "ret", ""),
    (r"trap", "trap", ""),
]

CONVERSION = re.compile(r"cvt(?:\.[a-z]+)*?\.(?P<d>[a-z]+\d\w*)\.(?P<s>[a-z]+\d\w*)")
PATTERNS = [(re.compile(pattern), op, roles) for pattern, op, roles in TABLE]


@cache
def arithmetic(opcode: str) -> Form | None:
    """The form of a mnemonic that is all registers and numbers; None if it is none."""
    for pattern, op, roles in PATTERNS:
        if found := pattern.fullmatch(opcode):
            return _plain(*_filled(opcode, found.groupdict(), op, roles))
    if found := CONVERSION.fullmatch(opcode):
        target, source = found["d"], found["s"]
        both = source == "f32" and target.endswith("x2")
        return _plain(opcode, [f"={_class(target)}", *[_class(source)] * (1 + both)])
    return None


def _filled(opcode: str, groups: dict[str, str | None], op: str, roles: str) -> tuple[str, list[str]]:
    kind = groups.get("t") or groups.get("u") or "b32"
    bits = 8 * SIZES[kind]
    known = {
        "name": opcode,
        "o": groups.get("o") or groups.get("p"),
        "t": kind,
        "z": groups.get("z") or "",
        "n": groups.get("n") or "",
        "bits": bits,
        "place": max(bits, 32),
        "unsigned": kind.replace("b", "u") if kind[0] == "b" and kind != "bf16" else kind,
    }
    third = {place: place if known["o"] == "mad" else "" for place in ("n", "w")}
    filled = roles.format(**third).replace("t", _class(kind)).split()
    return op.format(**known), filled


def _class(kind: str) -> str:
    return "w" if SIZES.get(kind) == 8 else "n"


def _plain(op: str, roles: list[str]) -> Form:
    def form(operands: tuple[str, ...]) -> Bound:
        if len(operands) != len(roles):
            raise NotImplementedError(f"with {len(operands)} operands; {len(roles)} are known")
        return Bound(op, roles, operands)

    return form
