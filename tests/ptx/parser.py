"""PTX text to a function of statements, each with its place in the text and in the source that it was compiled from.

The grammar is PTX's own and knows of no compiler: scopes with registers and labels of their own, statements over
several lines, declarations of parameters, of shared memory and of what a function refers to. What instructions mean is
the decoder's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
    "b128": 16,
}
"""Bytes of a type. A predicate has none."""

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
TOKEN = re.compile(
    r"(?P<assembly>// (?:begin|end) inline asm)|(?P<space>\s+|//[^\n]*)|(?P<line>\.(?:loc|file)\b[^\n]*)"
    r"|(?P<open>\{)|(?P<close>\})|(?P<label>[\w$%]+):(?!:)|(?P<statement>[^;]+);"
)
STATEMENT = re.compile(r"(?:@(!?)\s*(\S+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]](?:[^,{}\[\]]*[^,\s{}\[\]])?")
IDENTIFIER = re.compile(r"%?[A-Za-z_$][\w$]*")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
FUNCTION = re.compile(r"\.func\s+(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\([^)]*\))?[^;{]*([;{])")
VARIABLE = re.compile(
    r"^\s*(?:\.(?:visible|extern|weak)\s+)*\.(global|const|local)\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)", re.MULTILINE
)
SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.(?!align)\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?$"
)
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*\binlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
RANGE = re.compile(r"(%?[\w$]+)<(\d+)>")

Frames = tuple[tuple[str, int], ...]
"""(file, line): where an instruction comes from, then where that was inlined, and so on outwards."""


class Statement(NamedTuple):
    """One instruction. operands: as written, `{...}` and `[...]` whole. predicate: register, None = always.

    line: in the text, from 1; location: place in Function.locations; target: of a branch, the statement to go on with.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: int
    location: int
    target: int


class Parameter(NamedTuple):
    """Bytes from the beginning of the parameters, and bytes of it."""

    offset: int
    size: int


@dataclass(frozen=True)
class Function:
    """An entry. registers: name -> type, `name@n` in a scope; shared: variable -> its offset in shared memory.

    static_shared: bytes of shared memory that the text itself asks for; what a launch adds lies behind. threads,
    cluster: of a block, blocks of a cluster; () where the text does not say. unsupported: names that an instruction
    cannot use, with what they are.
    """

    name: str
    parameters: dict[str, Parameter]
    parameter_bytes: int
    threads: tuple[int, ...]
    cluster: tuple[int, ...]
    shared: dict[str, int]
    static_shared: int
    unsupported: dict[str, str]
    registers: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    locations: list[Frames] = field(default_factory=lambda: [()])


def parse(text: str) -> Function:
    """The one entry of a PTX text. Raises NotImplementedError for what is PTX and not for this emulator, by name."""
    if "/*" in text:
        text = COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]) if found[0][1] == "*" else found[0], text)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise NotImplementedError(f"expected one .entry, found {[entry[1] for entry in entries]}")
    entry = entries[0]
    functions = {found[1]: found[2] for found in FUNCTION.finditer(text)}
    if defined := sorted(name for name, end in functions.items() if end == "{"):
        raise NotImplementedError(f"functions beside the entry: {', '.join(defined)}")
    parameters, size = _parameters(entry[2])
    shared, static_shared = _shared(text)
    unsupported = dict.fromkeys(functions, "a function") | {
        found[2]: f"a variable in .{found[1]} memory" for found in VARIABLE.finditer(text)
    }
    function = Function(
        entry[1], parameters, size, _directive(entry[3], "(?:req|max)ntid"), _directive(entry[3], "reqnctapercluster"),
        shared, static_shared, unsupported,
    )  # fmt: skip
    _Body(function, dict(FILE.findall(text))).read(text, entry.end())
    return function


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas outside of braces and brackets."""
    if "{" in text or "[" in text:
        return tuple(OPERAND.findall(text))
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _directive(text: str, name: str) -> tuple[int, ...]:
    found = re.search(rf"\.{name}\s+([\d,\s]+)", text)
    return tuple(map(int, found[1].split(","))) if found else ()


def _parameters(text: str) -> tuple[dict[str, Parameter], int]:
    parameters, offset = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        found = PARAMETER.match(declaration)
        if found is None or found[2] not in SIZES:
            raise NotImplementedError(f"parameter {declaration}")
        element = SIZES[found[2]]
        alignment, size = int(found[1] or element), element * int(found[4] or 1)
        offset = -(-offset // alignment) * alignment
        parameters[found[3]] = Parameter(offset, size)
        offset += size
    return parameters, offset


def _shared(text: str) -> tuple[dict[str, int], int]:
    """What is `.extern` has no size of its own: it all begins behind the rest."""
    places, size, dynamic = {}, 0, []
    for extern, alignment, kind, name, count in SHARED.findall(text):
        if extern:
            dynamic.append((name, int(alignment or 1)))
            continue
        size = -(-size // int(alignment or SIZES[kind])) * int(alignment or SIZES[kind])
        places[name] = size
        size += SIZES[kind] * int(count or 1)
    for name, alignment in dynamic:
        places[name] = -(-size // alignment) * alignment
    return places, size


class _Body:
    """Reads the statements of a function's body into it."""

    def __init__(self, function: Function, files: dict[str, str]) -> None:
        self.function, self.files = function, files
        self.location = 0
        # LLVM counts the lines of inline assembly on from the line of the source that it stands in: the first is right.
        self.inline = self.held = False
        self.frames: dict[tuple[str, ...], Frames] = {}
        self.known: dict[Frames, int] = {(): 0}
        # Of each open scope: its number, and what the names of its registers have become.
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        self.parents: dict[int, int] = {}
        self.labels: dict[tuple[int, str], int] = {}
        self.branches: list[tuple[int, int]] = []

    def read(self, text: str, start: int) -> None:
        line, counted = text.count("\n", 0, start) + 1, start
        for kind, token, place in _tokens(text, start):
            if kind == "statement":
                line += text.count("\n", counted, place)
                counted = place
                self._statement(token, line)
            elif kind == "line":
                self._locate(token)
            elif kind == "assembly":
                self.held = False
                self.inline = "begin" in token
            elif kind == "label":
                self.labels[self.scopes[-1][0], token] = len(self.function.statements)
            elif kind == "open":
                scope = len(self.parents) + 1
                self.parents[scope] = self.scopes[-1][0]
                self.scopes.append((scope, {}))
            elif len(self.scopes) == 1:
                break
            else:
                self.scopes.pop()
        statements = self.function.statements
        for place, scope in self.branches:
            branch = statements[place]
            statements[place] = branch._replace(target=self._target(branch, scope))

    def _statement(self, text: str, line: int) -> None:
        if "//" in text:
            text = COMMENT.sub("", text)
        if text[0] == ".":
            self._declare(text)
            return
        renamed = {old: new for _, names in self.scopes for old, new in names.items()}
        if renamed:
            text = IDENTIFIER.sub(lambda found: renamed.get(found[0], found[0]), text)
        found = STATEMENT.match(text)
        if found is None:
            raise NotImplementedError(f"statement {text!r} in line {line}")
        negated, predicate, opcode, operands = found.groups()
        if opcode.startswith("bra"):
            self.branches.append((len(self.function.statements), self.scopes[-1][0]))
        self.function.statements.append(
            Statement(opcode, split_operands(operands.strip()), predicate, bool(negated), line, self.location, -1)
        )

    def _declare(self, text: str) -> None:
        if not text.startswith(".reg"):
            if not text.startswith((".pragma", ".shared", ".local", ".extern", ".branchtargets")):
                raise NotImplementedError(f"declaration {text}")
            return
        _, kind, names = text.split(None, 2) if not text.startswith(".reg.") else (None, *text[4:].split(None, 1))
        scope, local = self.scopes[-1]
        for name in split_operands(names):
            found = RANGE.fullmatch(name)
            declared = [f"{found[1]}{index}" for index in range(int(found[2]))] if found else [name]
            if scope:
                local.update({each: f"{each}@{scope}" for each in declared})
                declared = [local[each] for each in declared]
            self.function.registers.update(dict.fromkeys(declared, kind.removeprefix(".")))

    def _locate(self, text: str) -> None:
        """What is inlined names the place in the caller, whose own frames the text has given before."""
        found = LOCATION.match(text)
        if found is None or self.held:
            return
        self.held = self.inline
        place, caller = found.groups()[:3], found.groups()[3:]
        outer = self.frames.get(caller, ((self.files.get(caller[0], caller[0]), int(caller[1])),)) if caller[0] else ()
        frames = ((self.files.get(place[0], place[0]), int(place[1])), *outer)
        self.frames[place] = frames
        if frames not in self.known:
            self.known[frames] = len(self.function.locations)
            self.function.locations.append(frames)
        self.location = self.known[frames]

    def _target(self, branch: Statement, scope: int) -> int:
        if branch.opcode not in ("bra", "bra.uni"):
            return -1
        name = branch.operands[0]
        while (scope, name) not in self.labels:
            if not scope:
                raise NotImplementedError(f"branch to {name} in line {branch.line}: there is no such label")
            scope = self.parents[scope]
        return self.labels[scope, name]


def _tokens(text: str, start: int) -> Iterator[tuple[str, str, int]]:
    """(kind, text, where) of all that is no space."""
    for found in TOKEN.finditer(text, start):
        kind = found.lastgroup
        if kind != "space":
            assert kind is not None
            yield kind, found[kind], found.start()
