"""Forms of the mnemonics that move data, wait and synchronise: memory, copies, exchange, tensor cores, barriers."""

from __future__ import annotations

import re
from functools import cache

from tests.ptx.instructions import SIGNED, Bound, Form
from tests.ptx.parser import SIZES, split_operands

CLUSTER, ACQUIRE, RELEASE, SCOPE_BLOCK, SCOPE_CLUSTER, TRANSPOSED = 4, 8, 16, 32, 64, 128
READ = NO_INCREMENT = UNALIGNED = 256
A_REGISTERS, A_TRANSPOSED, B_TRANSPOSED, NEGATE_A, NEGATE_B = 1024, 2048, 4096, 8192, 16384
"""Flags of a record, as cpp/abi.h has them."""

SCOPES = {"cta": SCOPE_BLOCK, "cluster": SCOPE_CLUSTER, "gpu": 0, "sys": 0}
ORDERS = {"weak": 0, "relaxed": 0, "volatile": 0, "acquire": ACQUIRE, "release": RELEASE, "acq_rel": ACQUIRE | RELEASE}
SPACES = {
    "global": ("global", 0),
    "shared": ("shared", 0),
    "shared::cta": ("shared", 0),
    "shared::cluster": ("shared", CLUSTER),
}
CACHE = re.compile(r"ca|cg|cs|lu|cv|wb|wt|nc|L1::\w+|L2::\w+")
VECTOR = re.compile(r"v([248])")
ATOMIC = frozenset(("add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"))
FENCES = {"sc": ACQUIRE | RELEASE, "acq_rel": ACQUIRE | RELEASE, "acquire": ACQUIRE, "release": RELEASE}
SHUFFLES = ("up", "down", "bfly", "idx")
PROXIES = {"": 3, ".shared::cta": 1, ".shared::cluster": 1, ".global": 2}


def address(operand: str) -> tuple[str, int]:
    """`[%r1 + -16]` -> the register or variable, and the offset."""
    base, _, offset = operand[1:-1].replace(" ", "").partition("+")
    return base, int(offset, 0) if offset else 0


def parts(operand: str) -> tuple[str, ...]:
    """The registers of `{...}`, or the one that there is."""
    return split_operands(operand[1:-1].strip()) if operand[0] == "{" else (operand,)


class _Modifiers:
    """The modifiers of a memory access, in any order. Raises NotImplementedError for one that is not known."""

    def __init__(self, modifiers: list[str], operations: frozenset[str] = frozenset()) -> None:
        self.space, self.order, self.operation = None, None, ""
        self.flags, self.vec, self.hinted, self.kind = 0, 1, False, modifiers[-1]
        if self.kind not in SIZES or self.kind == "b128":
            raise NotImplementedError(f"of type {self.kind}")
        self.size = SIZES[self.kind]
        scope = "gpu"
        for modifier in modifiers[:-1]:
            if modifier in SPACES:
                self.space, mapped = SPACES[modifier]
                self.flags |= mapped
            elif modifier in ORDERS:
                self.order = modifier
                self.flags |= ORDERS[modifier]
            elif modifier in SCOPES:
                scope = modifier
            elif modifier in operations:
                self.operation = modifier
            elif found := VECTOR.fullmatch(modifier):
                self.vec = int(found[1])
            elif CACHE.fullmatch(modifier):
                self.hinted |= modifier == "L2::cache_hint"
            elif modifier != "noftz":
                raise NotImplementedError(f"with .{modifier}")
        if self.space is None:
            raise NotImplementedError("of generic memory")
        if self.order not in (None, "weak"):
            self.flags |= SCOPES[scope]

    @property
    def place(self) -> str:
        """The class of an address."""
        return "w" if self.space == "global" else "n"


def _load_store(opcode: str) -> Form:
    load, *modifiers = opcode.split(".")
    known = _Modifiers(modifiers)
    plain = known.order in (None, "weak")
    flags = known.flags | (SIGNED if known.kind[0] == "s" else 0)
    access = "=v" if load == "ld" else "v"

    def form(operands: tuple[str, ...]) -> Bound:
        at, values = (operands[1], operands[0]) if load == "ld" else operands[:2]
        base, offset = address(at)
        registers = [None if each == "_" else each for each in parts(values)]
        if len(registers) != known.vec or len(operands) != 2 + known.hinted:
            raise NotImplementedError(f"with operands {', '.join(operands)}")
        roles = [access] * known.vec
        if plain:
            return Bound(
                f"{load}.{known.space}", [*roles, known.place], [*registers, base], flags, known.size, known.vec, offset
            )
        op = f"atom.{known.space}.{'load' if load == 'ld' else 'store'}.b{8 * known.size}"
        order = ([*roles, known.place], [*registers, base])
        if load == "st":
            order = ([known.place, *roles], [base, *registers])
        return Bound(op, *order, flags, known.size, known.vec, offset)

    return form


def _atomic(opcode: str) -> Form:
    """atom and red; the latter has no result."""
    base, *modifiers = opcode.split(".")
    known = _Modifiers(modifiers, ATOMIC)
    kind = known.kind if known.operation in ("add", "min", "max", "inc", "dec") else f"b{8 * known.size}"
    value = "w" if known.size == 8 else "n"

    def form(operands: tuple[str, ...]) -> Bound:
        results, (at, *values) = (operands[:1], operands[1:]) if base == "atom" else ((), operands)
        if known.hinted:
            values.pop()
        place, offset = address(at)
        given = [each for operand in values for each in parts(operand)]
        if len(given) != known.vec * (2 if known.operation == "cas" else 1):
            raise NotImplementedError(f"with operands {', '.join(operands)}")
        taken = [each for operand in results for each in parts(operand) if operand != "_"]
        return Bound(
            f"atom.{known.space}.{known.operation}.{kind}",
            [*[f"={value}"] * len(taken), known.place, *[value] * len(given)],
            [*taken, place, *given], known.flags, known.size, known.vec, offset,
        )  # fmt: skip

    return form


def _copy(opcode: str) -> Form:
    hinted = opcode.endswith(".L2::cache_hint")

    def form(operands: tuple[str, ...]) -> Bound:
        (target, target_offset), (source, source_offset) = address(operands[0]), address(operands[1])
        rest = operands[3:-1] if hinted else operands[3:]
        skip = rest[0] if rest and rest[0].startswith("%p") else None
        count = rest[0] if rest and skip is None else None
        return Bound(
            "cp.async", ["n", "w", "n", "p"], [target, source, count, skip], 0, int(operands[2], 0), 1,
            target_offset, source_offset,
        )  # fmt: skip

    return form


def _matrix_move(match: re.Match[str]) -> Form:
    """ldmatrix and stmatrix."""
    count, flags = int(match["count"]), TRANSPOSED if match["trans"] else 0
    load = match["op"] == "ldmatrix"

    def form(operands: tuple[str, ...]) -> Bound:
        values, at = operands if load else operands[::-1]
        base, offset = address(at)
        registers = parts(values)
        return Bound(
            f"{match['op']}.{match['shape']}.{match['kind']}", [*["=n" if load else "n"] * len(registers), "n"],
            [*registers, base], flags, 0, count, offset,
        )  # fmt: skip

    return form


def _mma(match: re.Match[str]) -> Form:
    kinds = match["kinds"].split(".")
    op = f"mma.{match['shape']}.{match['kinds']}{match['satfinite'] or ''}"
    classes = ["w" if SIZES.get(kind) == 8 else "n" for kind in kinds]

    def form(operands: tuple[str, ...]) -> Bound:
        roles, tokens = [], []
        for number, (operand, kind) in enumerate(zip(operands, classes, strict=True)):
            registers = parts(operand)
            roles += [kind if number else f"={kind}"] * len(registers)
            tokens += registers
        return Bound(op, roles, tokens)

    return form


def _wgmma(match: re.Match[str]) -> Form:
    columns = int(match["n"])

    def form(operands: tuple[str, ...]) -> Bound:
        results, a, b, scale, *flagged = operands
        numbers = [int(each) for each in flagged]
        # Products of integers have neither signs nor layouts.
        signs, transposed = numbers[:2] or (1, 1), numbers[2:]
        flags = (NEGATE_A if signs[0] < 0 else 0) | (NEGATE_B if signs[1] < 0 else 0)
        if a[0] == "{":
            # A in registers lies as it must: the one flag that is left is B's.
            flags |= A_REGISTERS | (B_TRANSPOSED if any(transposed) else 0)
        elif transposed:
            flags |= (A_TRANSPOSED if transposed[0] else 0) | (B_TRANSPOSED if transposed[1] else 0)
        factors = parts(a)
        registers = parts(results)
        return Bound(
            f"wgmma.{match['kinds']}",
            [*["+n"] * len(registers), *["n" if a[0] == "{" else "w"] * len(factors), "w", "p"],
            [*registers, *factors, b, None if scale in ("1", "true") else scale], flags, 0, 1, columns,
        )  # fmt: skip

    return form


def _shuffle(match: re.Match[str]) -> Form:
    mode = SHUFFLES.index(match["mode"])

    def form(operands: tuple[str, ...]) -> Bound:
        result, *rest = operands
        value, _, predicate = result.partition("|")
        roles, tokens = ["=n", "n", "n", "n", "n"], [value, *rest]
        if predicate:
            roles, tokens = [*roles, "=p"], [*tokens, predicate]
        return Bound("shfl", roles, tokens, imm=mode)

    return form


def _elect(match: re.Match[str]) -> Form:
    def form(operands: tuple[str, ...]) -> Bound:
        leader, _, predicate = operands[0].partition("|")
        return Bound("elect", ["=n", "=p", "n"], [None if leader == "_" else leader, predicate, operands[1]])

    return form


def _block_barrier(match: re.Match[str]) -> Form:
    kind, flags = match["kind"], 0 if match["base"] == "bar" or match["aligned"] else UNALIGNED

    def form(operands: tuple[str, ...]) -> Bound:
        number, count = (*operands, None)[:2]
        return Bound(f"bar.{kind}", ["n", "n"], [number, count], flags)

    return form


def _barrier_reduction(match: re.Match[str]) -> Form:
    def form(operands: tuple[str, ...]) -> Bound:
        result, number, *count, predicate = operands
        kind = "=n" if match["kind"] == "popc" else "=p"
        return Bound(f"bar.red.{match['kind']}", [kind, "n", "n", "p"], [result, number, *(count or [None]), predicate])

    return form


def _fence(match: re.Match[str]) -> Form:
    flags = FENCES[match["order"]] | SCOPES[match["scope"]]
    return lambda operands: Bound("fence", flags=flags)


def _lop3(match: re.Match[str]) -> Form:
    return lambda operands: Bound("lop3.b32", ["=n", "n", "n", "n"], operands[:4], imm=int(operands[4], 0))


def _number(op: str, flags: int = 0) -> Form:
    """An instruction whose only operand, if it has one, is a number."""
    return lambda operands: Bound(op, flags=flags, imm=int(operands[0], 0) if operands else 0)


def _ignored(match: re.Match[str]) -> Form:
    return lambda operands: Bound("nop")


def _policy(match: re.Match[str]) -> Form:
    """A cache policy is a number that nobody reads: accesses leave their hints out."""
    return lambda operands: Bound("mov.64", ["=w", "w"], [operands[0], "0"])


WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k\d+\.(?P<kinds>\w+\.\w+\.\w+)"
TABLE = [
    (r"lop3\.b32", _lop3),
    (r"(?P<op>(?:ld|st)matrix)\.sync\.aligned\.(?P<shape>m8n8)\.x(?P<count>[124])(?P<trans>\.trans)?"
     r"\.shared(?:::cta)?\.(?P<kind>b16)", _matrix_move),
    (r"mma\.sync\.aligned\.(?P<shape>m\d+n\d+k\d+)\.row\.col(?P<satfinite>\.satfinite)?"
     r"\.(?P<kinds>\w+\.\w+\.\w+\.\w+)", _mma),
    (WGMMA, _wgmma),
    (r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32", _shuffle),
    (r"elect\.sync", _elect),
    (r"(?P<base>bar|barrier)(?:\.cta)?\.(?P<kind>sync|arrive)(?P<aligned>\.aligned)?", _block_barrier),
    (r"(?:bar|barrier)(?:\.cta)?\.red\.(?P<kind>popc|and|or)(?:\.aligned)?\.(?:u32|pred)", _barrier_reduction),
    (r"fence\.(?P<order>sc|acq_rel|acquire|release)\.(?P<scope>cta|cluster|gpu|sys)", _fence),
    (r"fence\.mbarrier_init\.(?P<order>release)\.(?P<scope>cluster)", _fence),
    (r"createpolicy\.\S+", _policy),
    (r"nanosleep\.u32", lambda match: lambda operands: Bound("nanosleep")),
    (r"(?:prefetch|prefetchu|discard|applypriority|cp\.async\.bulk\.prefetch)\.\S+", _ignored),
]  # fmt: skip
PATTERNS = [(re.compile(pattern), make) for pattern, make in TABLE]
NUMBERS = {
    "cp.async.commit_group": _number("cp.async.commit_group"),
    "cp.async.wait_group": _number("cp.async.wait_group"),
    "cp.async.wait_all": _number("cp.async.wait_all"),
    "cp.async.bulk.commit_group": _number("cp.async.bulk.commit_group"),
    "cp.async.bulk.wait_group": _number("cp.async.bulk.wait_group"),
    "cp.async.bulk.wait_group.read": _number("cp.async.bulk.wait_group", READ),
    "wgmma.fence.sync.aligned": _number("wgmma.fence"),
    "wgmma.commit_group.sync.aligned": _number("wgmma.commit_group"),
    "wgmma.wait_group.sync.aligned": _number("wgmma.wait_group"),
    "setmaxnreg.inc.sync.aligned.u32": _number("setmaxnreg"),
    "setmaxnreg.dec.sync.aligned.u32": _number("setmaxnreg"),
    "griddepcontrol.wait": _number("griddepcontrol.wait"),
    "griddepcontrol.launch_dependents": _number("griddepcontrol.launch_dependents"),
    "membar.cta": _number("fence", ACQUIRE | RELEASE | SCOPE_BLOCK),
    "membar.gl": _number("fence", ACQUIRE | RELEASE),
    "membar.sys": _number("fence", ACQUIRE | RELEASE),
}


@cache
def transfer(opcode: str) -> Form | None:
    """The form of a mnemonic that is no arithmetic, or None. Raises NotImplementedError for an unknown modifier."""
    if opcode in NUMBERS:
        return NUMBERS[opcode]
    for pattern, make in PATTERNS:
        if found := pattern.fullmatch(opcode):
            return make(found)
    if opcode.startswith("fence.proxy.async") and opcode[17:] in PROXIES:
        proxies = PROXIES[opcode[17:]]
        return lambda operands: Bound("fence.proxy.async", imm=proxies)
    base = opcode.partition(".")[0]
    if base in ("ld", "st"):
        return _load_store(opcode)
    if base in ("atom", "red"):
        return _atomic(opcode)
    if re.fullmatch(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)*", opcode):
        return _copy(opcode)
    return None
