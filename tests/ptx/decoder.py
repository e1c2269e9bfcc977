"""A PTX function to what the machine runs: records of ops, a pool of operands, constants, every register in its place.

Whatever is not known, an instruction, a modifier, the width of a register, an operand, is refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from tests.ptx.clusters import cluster_form
from tests.ptx.instructions import SIGNED, WIDE, Bound, Form, arithmetic
from tests.ptx.parser import SIZES, Frames, Function, Statement, parse
from tests.ptx.registers import READ, WRITE, Accesses, Blocks, Flow, allocate, until_waits
from tests.ptx.transfers import address, parts, transfer

RECORD = np.dtype(
    [
        *[(name, "<i4") for name in ("op", "first", "count", "written", "predicate", "negated", "target")],
        *[(name, "<u4") for name in ("size", "vec", "flags", "line", "padding")],
        *[(name, "<i8") for name in ("imm", "imm2")],
    ]
)
CONSTANT = np.dtype([("offset", "<u4"), ("size", "<u4"), ("value", "<u8")])
"""Both as cpp/abi.h has them."""

PLACE_BYTES = {"p": 4, "n": 128, "w": 256}
"""Of a register: 32 lanes, a predicate one bit each."""
CONSTANT_SIZE = {"p": 0, "n": 4, "w": 8}
ALIGNMENT = 64

SPECIAL_AXES = ("tid", "ntid", "ctaid", "nctaid")
SPECIAL_NAMES = [
    *(f"%{name}.{axis}" for name in SPECIAL_AXES for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%cluster_nctarank"),
    *(f"%{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid") for axis in "xyz"),
    *("%is_explicit_cluster", *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge"))),
    *("%clock", "%smid", "%gridid"),
]
SPECIALS = {name: number for number, name in enumerate(SPECIAL_NAMES)}
"""As enum Special of cpp/abi.h."""

HEX_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
ENDS = frozenset(("ret", "trap"))


@dataclass(frozen=True)
class Program:
    """What the machine is given. ops: names, by the number that records have until they are loaded. register_bytes: of
    a warp; parameter_bytes: of a launch; static_shared: bytes of shared memory that the text asks for itself.

    origins: of each PTX line with an instruction, what of `frames` it comes from.
    """

    name: str
    ops: tuple[str, ...]
    records: npt.NDArray[np.void]
    pool: npt.NDArray[np.int32]
    constants: npt.NDArray[np.void]
    register_bytes: int
    parameter_bytes: int
    static_shared: int
    threads: tuple[int, ...]
    cluster: tuple[int, ...]
    origins: dict[int, int]
    frames: tuple[Frames, ...]

    def where(self, line: int) -> Frames:
        """(file, line) of the source that a PTX line comes from, and of all that it was inlined into."""
        return self.frames[self.origins.get(line, 0)]

    def save(self) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays that say it all."""
        arrays = ("records", "pool", "constants")
        rest = {name: value for name, value in vars(self).items() if name not in arrays}
        rest["origins"] = list(self.origins.items())
        text = np.frombuffer(json.dumps(rest).encode(), np.uint8)
        return {name: getattr(self, name) for name in arrays} | {"rest": text}

    @classmethod
    def load(cls, arrays: dict[str, npt.NDArray[np.generic]]) -> Program:
        rest = json.loads(arrays["rest"].tobytes())
        for name in ("ops", "threads", "cluster"):
            rest[name] = tuple(rest[name])
        rest["origins"] = dict(rest["origins"])
        rest["frames"] = tuple(tuple((file, line) for file, line in frames) for frames in rest["frames"])
        return cls(**{name: arrays[name] for name in ("records", "pool", "constants")}, **rest)


def decode(text: str, share_places: bool = True) -> Program:
    """Raises NotImplementedError for what the emulator does not know, by its name and line.

    share_places: registers that are not needed at the same time lie in the same place.
    """
    return _Decoder(parse(text)).program(share_places)


@cache
def form_of(opcode: str) -> Form:
    """Raises NotImplementedError for a mnemonic that is not known."""
    form = arithmetic(opcode) or transfer(opcode) or cluster_form(opcode)
    if form is None:
        raise NotImplementedError("is not known")
    return form


class _Decoder:
    """Registers have numbers here; constant k is number -2 - k."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.classes = [_class_of(name, kind) for name, kind in function.registers.items()]
        self.registers = {name: number for number, name in enumerate(function.registers)}
        self.constants: dict[tuple[int, str], int] = {}
        self.ops: dict[str, int] = {}
        self.rows: list[tuple[int, ...]] = []
        self.pool: list[int] = []
        self.access: list[int] = []

    def program(self, share_places: bool) -> Program:
        function = self.function
        starts = []
        for statement in function.statements:
            starts.append(len(self.rows))
            try:
                for bound in self._bind(statement):
                    self._emit(bound, statement)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{function.name}, PTX line {statement.line}: {statement.opcode} {error}"
                ) from None
        starts.append(len(self.rows))
        self._end()
        records = np.array(self.rows, np.int64)
        table = np.zeros(len(records), RECORD)
        for column, name in enumerate(RECORD.names or ()):
            table[name] = records[:, column].astype(RECORD[name])
        # A statement may be several records.
        branches = table["target"] >= 0
        table["target"][branches] = np.array(starts)[table["target"][branches]]
        places, top = self._places(table, share_places)
        constants = np.zeros(len(self.constants), CONSTANT)
        constants["value"] = [value for value, _ in self.constants]
        constants["size"] = [CONSTANT_SIZE[kind] for _, kind in self.constants]
        constants["offset"], size = _one_each(np.array([PLACE_BYTES[kind] for _, kind in self.constants], np.int64))
        constants["offset"] += np.uint32(top)
        # -1 - number counts from 0: nothing, then the constants.
        behind = np.concatenate(([-1], constants["offset"].astype(np.int64)))
        numbers = np.array(self.pool or [-1], np.int64)
        pool = np.where(numbers >= 0, places[np.maximum(numbers, 0)], behind[np.maximum(-1 - numbers, 0)])
        guarded = table["predicate"] >= 0
        table["predicate"][guarded] = places[table["predicate"][guarded]]
        return Program(
            function.name, tuple(self.ops), table, pool.astype(np.int32), constants, top + size,
            function.parameter_bytes, function.static_shared, function.threads, function.cluster,
            {statement.line: statement.location for statement in function.statements}, tuple(function.locations),
        )  # fmt: skip

    def _bind(self, statement: Statement) -> list[Bound]:
        opcode, operands = statement.opcode, statement.operands
        if opcode in ("bra", "bra.uni"):
            return [Bound("bra")]
        if opcode.startswith("mov."):
            if operands[1] in SPECIALS:
                wide = opcode.endswith("64")
                role, flags = ("=w", WIDE) if wide else ("=n", 0)
                return [Bound("special", [role], operands[:1], flags, imm=SPECIALS[operands[1]])]
            if operands[0][0] == "{" or operands[1][0] == "{":
                return [_packing(opcode, operands)]
        if opcode.startswith("ld.param."):
            return self._parameters(opcode, operands)
        if len(operands) == 4 and opcode.endswith(".f32") and opcode.startswith(("min.", "max.")):
            # Of three: first of two.
            between, form = self._register("n"), form_of(opcode)
            return [form((between, *operands[1:3])), form((operands[0], between, operands[3]))]
        if opcode == "cvta.param.u64":
            # In their own memory, parameters begin at 0.
            begin = self._register("w")
            return [Bound("param.address", ["=w"], [begin]), form_of("add.u64")((operands[0], begin, operands[1]))]
        return [form_of(opcode)(operands)]

    def _register(self, kind: str) -> str:
        """One that nobody else has."""
        name = f"@{len(self.registers)}"
        self.registers[name] = len(self.registers)
        self.classes.append(kind)
        return name

    def _parameters(self, opcode: str, operands: tuple[str, ...]) -> list[Bound]:
        *vector, kind = opcode.split(".")[2:]
        name, offset = address(operands[1])
        if kind not in SIZES or vector not in ([], ["v2"], ["v4"]):
            raise NotImplementedError("is not known")
        if name not in self.function.parameters:
            raise NotImplementedError(f"of {name}, which is no parameter")
        flags, size = SIGNED if kind[0] == "s" else 0, SIZES[kind]
        imm = self.function.parameters[name].offset + offset
        return [
            Bound("param", ["=v"], [register], flags, size, 1, imm + size * number)
            for number, register in enumerate(parts(operands[0]))
        ]

    def _emit(self, bound: Bound, statement: Statement) -> None:
        first, flags, wide = len(self.pool), bound.flags, set()
        guarded = statement.predicate is not None
        for role, token in zip(bound.roles, bound.tokens, strict=True):
            if role[0] in "=+":
                access, kind = READ | WRITE if guarded or role[0] == "+" else WRITE, role[1:]
            else:
                access, kind = READ, role
            if token is None:
                self.pool.append(-1)
                self.access.append(0)
                continue
            number = self.registers.get(token)
            if number is None:
                if access & WRITE:
                    raise NotImplementedError(f"writes {token}, which is no register")
                number = self._constant(token, "w" if kind == "v" and bound.size == 8 else "n" if kind == "v" else kind)
                access = 0
            elif kind == "v":
                wide.add(self.classes[number])
            elif self.classes[number] != kind:
                raise NotImplementedError(f"with {token} of {self._type(token)}")
            self.pool.append(number)
            self.access.append(access)
        if wide:
            if len(wide) > 1 or "p" in wide or (bound.size == 8 and wide != {"w"}):
                raise NotImplementedError(f"with registers {', '.join(map(str, bound.tokens))}")
            flags |= WIDE if wide == {"w"} and bound.size < 8 else 0
        predicate = -1
        if guarded:
            assert statement.predicate is not None
            predicate = self.registers.get(statement.predicate, -1)
            if predicate < 0 or self.classes[predicate] != "p":
                raise NotImplementedError(f"under {statement.predicate}, which is no predicate")
        written = len(list(takewhile(lambda role: role[0] in "=+", bound.roles)))
        op = self.ops.setdefault(bound.op, len(self.ops))
        self.rows.append(
            (op, first, len(bound.roles), written, predicate, int(statement.negated), statement.target, bound.size,
             bound.vec, flags, statement.line, 0, bound.imm, bound.imm2)
        )  # fmt: skip

    def _end(self) -> None:
        """A body may end without ret, and a label may stand behind its last instruction."""
        line = self.function.statements[-1].line if self.function.statements else 0
        self._emit(Bound("ret"), Statement("ret", (), None, False, line, 0, -1))

    def _type(self, name: str) -> str:
        return f"type {self.function.registers[name]}"

    def _constant(self, token: str, kind: str) -> int:
        value = self._value(token, kind)
        return -2 - self.constants.setdefault((value, kind), len(self.constants))

    def _value(self, token: str, kind: str) -> int:
        """Of a number, or of a place in shared memory or among parameters, as bits. Raises NotImplementedError else."""
        mask = (1 << (64 if kind == "w" else 32)) - 1
        if kind == "p" and token in ("true", "false", "1", "0", "-1"):
            return 0 if token in ("false", "0") else mask
        if INTEGER.fullmatch(token) and kind != "p":
            return int(token.rstrip("U"), 0) & mask
        if (found := HEX_FLOAT.fullmatch(token)) and (found[1] is None) == (kind == "w"):
            return int(found[1] or found[2], 16)
        if token in self.function.shared and kind != "p":
            return self.function.shared[token]
        if token in self.function.parameters and kind != "p":
            return self.function.parameters[token].offset
        what = self.function.unsupported.get(token)
        raise NotImplementedError(f"with operand {token}{f', {what}' if what else ''}")

    def _places(self, table: npt.NDArray[np.void], share: bool) -> tuple[npt.NDArray[np.int64], int]:
        owner = np.repeat(np.arange(len(table)), table["count"])
        register, kind = np.array(self.pool, np.int64), np.array(self.access, np.int64)
        guards = np.flatnonzero(table["predicate"] >= 0)
        accesses = Accesses(
            np.concatenate((owner[kind > 0], guards)),
            np.concatenate((register[kind > 0], table["predicate"][guards].astype(np.int64))),
            np.concatenate((kind[kind > 0], np.full(len(guards), READ))),
        )
        names = list(self.ops)
        ends = np.isin(table["op"], [self.ops[name] for name in ENDS if name in self.ops])
        jumps = table["op"] == self.ops.get("bra", -1)
        falls = ~(ends | jumps) | (table["predicate"] >= 0)
        blocks = Blocks(Flow(table["target"].astype(np.int64), falls))
        products = [number for number, name in enumerate(names) if name.startswith("wgmma.") and name.count(".") == 3]
        holds = {
            int(place): [each for each in self._operands(table[place]) if each >= 0]
            for place in np.flatnonzero(np.isin(table["op"], products))
        }
        if holds:
            waits = np.flatnonzero(table["op"] == self.ops.get("wgmma.wait_group", -1))
            late = until_waits(blocks, holds, {int(place): not table["imm"][place] for place in waits})
            accesses = Accesses(
                np.concatenate((accesses.instruction, late.instruction)),
                np.concatenate((accesses.register, late.register)),
                np.concatenate((accesses.kind, late.kind)),
            )
        sizes = np.array([PLACE_BYTES[kind] for kind in self.classes], np.int64)
        places, top = allocate(blocks, accesses, sizes) if share else _one_each(sizes)
        # Constants lie behind.
        return places, -(-top // PLACE_BYTES["w"]) * PLACE_BYTES["w"]

    def _operands(self, record: np.void) -> list[int]:
        return self.pool[record["first"] : record["first"] + record["count"]]


def _one_each(sizes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Places one behind the other, the largest first, and their end."""
    order = np.argsort(-sizes, kind="stable")
    places = np.zeros(len(sizes), np.int64)
    places[order] = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes[order])[:-1])) if len(sizes) else 0
    return places, -(-int(sizes.sum()) // ALIGNMENT) * ALIGNMENT


def _class_of(name: str, kind: str) -> str:
    if kind == "pred":
        return "p"
    if kind not in SIZES or kind == "b128":
        raise NotImplementedError(f"register {name} of type {kind}")
    return "w" if SIZES[kind] == 8 else "n"


def _packing(opcode: str, operands: tuple[str, ...]) -> Bound:
    """mov between a register and the parts of one."""
    size = SIZES.get(opcode.split(".")[-1], 0)
    whole = "w" if size == 8 else "n"
    if size not in (4, 8):
        raise NotImplementedError(f"of {opcode} into parts")
    if operands[0][0] == "{":
        pieces = [None if each == "_" else each for each in parts(operands[0])]
        return Bound("unpack", [*["=n"] * len(pieces), whole], [*pieces, operands[1]], size=size)
    pieces = list(parts(operands[1]))
    return Bound("pack", [f"={whole}", *["n"] * len(pieces)], [operands[0], *pieces], size=size)
