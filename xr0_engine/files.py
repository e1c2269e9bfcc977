"""The checked reader: every JSON and YAML file that is read comes through here, and what it costs is bounded first.

A file's bytes, its values and their depth are limited before it is parsed; numbers are finite and fit into 64 bits; no
key stands twice. What a reader then makes of the values goes through `flag`, `number`, `whole`, `text`, `section` and
`table`, inside `reading`, so that whatever is wrong is one error that names the file and the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from xr0_engine.types import CheckpointError, FileError

if TYPE_CHECKING:
    import numpy as np

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another."""
SETTINGS_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Where a processor that transformers 5 saves has, under `image_processor`, what 4.57 writes into SETTINGS_FILE."""

GUARD_FILE = "guard.json"
"""A guard's thresholds (docs/guard.md), in a checkpoint's folder, where they are found."""

JSON_BYTES = 32 << 20
"""Three times the largest file that is read, the tokenizer of Qwen3 (11 MB)."""
JSON_VALUES = 1 << 21
"""Three times what is in the same file. A value takes up to 200 bytes in Python, so that a file takes up to 0.4 GiB."""
LINE_BYTES = 4 << 20
"""Of a file of lines: a chunk of a recording has 1024 actions of 1024 columns at most in what a policy may give."""
YAML_BYTES = 256 << 10
"""A hundred times the largest profile; how many values they may be is in yaml_loader.py."""
DEPTH = 64
"""Lists and mappings in each other. No file that is read has more than ten."""

FAULTS = (TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError, MemoryError)
"""What reading a value of the wrong kind raises, besides KeyError."""

_LONG_INTEGER = re.compile(rb"\d{19}")
_LARGE_EXPONENT = re.compile(rb"[eE]\+?0*[1-9]\d\d|\d{300}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_QUOTED = re.compile(rb'"[^"]*"')
_ROUND = bytes.maketrans(b"{}", b"[]")
_PLAIN = bytes(set(range(256)) - set(b'[]{}"'))


def read_json(
    path: Path,
    error: type[ValueError] = CheckpointError,
    most_bytes: int = JSON_BYTES,
    most_values: int = JSON_VALUES,
) -> Any:
    """What a JSON file holds.

    error: what is raised, naming the file, for a git-lfs pointer, for what is no JSON, and for what goes beyond the
    limits of this module. Raises OSError for a file that cannot be opened.
    """
    data = read_bytes(path, error, most_bytes)
    try:
        return parse_json(data, most_values)
    except ValueError as fault:
        raise error(f"{path} is not valid JSON: {fault}") from None


def parse_json(data: bytes, most_values: int = JSON_VALUES, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8, whose length is the caller's to limit. Raises ValueError, also for numbers of
    more than 64 bits, for a key that stands twice in an object, and if finite for NaN and infinity."""
    values = 1 + data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > most_values:
        raise ValueError(f"expected at most {most_values} values, got up to {values}")
    _check_depth(data)
    hooks: dict[str, Any] = {"object_pairs_hook": _object}
    if finite:
        hooks["parse_constant"] = _finite
    # These two are called for every number: only where there may be one that is too large.
    if _LONG_INTEGER.search(data):
        hooks["parse_int"] = _integer
    if _LARGE_EXPONENT.search(data):
        hooks["parse_float"] = _finite
    value = json.loads(data.decode("utf-8"), **hooks)
    if _SURROGATE.search(data):
        # Half of a pair is no character, and cannot be told to anybody.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as fault:
            raise ValueError(f"expected text that UTF-8 can hold: {fault}") from None
    return value


def json_lines(path: Path, error: type[ValueError] = CheckpointError) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of JSON that ends with a line end; blank ones are left out, and a last line
    that was cut off. Raises as read_json, naming the line too."""
    _refuse_strange(path, error)
    with path.open("rb") as file:
        number = 0
        while data := file.readline(LINE_BYTES + 1):
            number += 1
            if len(data) > LINE_BYTES:
                raise error(f"{path}, line {number}: expected at most {LINE_BYTES} bytes")
            if not data.endswith(b"\n"):
                return
            if not data.strip():
                continue
            try:
                value = parse_json(data)
            except ValueError as fault:
                raise error(f"{path}, line {number}: not valid JSON: {fault}") from None
            if not isinstance(value, dict):
                raise error(f"{path}, line {number}: expected an object, got {value!r:.80}")
            yield number, value


def read_yaml(path: Path, error: type[ValueError] = FileError) -> Any:
    """What a YAML file of plain values holds; as read_json, whose limits hold for what aliases stand for too."""
    data = read_bytes(path, error, YAML_BYTES)
    try:
        return parse_yaml(data.decode("utf-8"))
    except (*FAULTS, KeyError) as fault:
        raise error(f"{path} is not valid YAML: {one_line(fault)}") from None


def parse_yaml(content: str) -> Any:
    """The value of a YAML text. Raises ValueError, and what the parser raises for words it stumbles over."""
    import yaml

    from xr0_engine.yaml_loader import CheckedLoader

    try:
        return yaml.load(content, CheckedLoader)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{fault.problem or fault.context}{place}") from None
    except yaml.YAMLError as fault:
        raise ValueError(one_line(fault)) from None


def read_bytes(path: Path, error: type[ValueError] = CheckpointError, most_bytes: int = JSON_BYTES) -> bytes:
    """All of a file. Raises `error` for a git-lfs pointer, what is no plain file, and a larger one; OSError."""
    _refuse_strange(path, error)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise error(f"{path}: expected at most {most_bytes >> 10} KiB, got {path.stat().st_size >> 10}")
    return data


@contextmanager
def reading(where: Path | str, error: type[ValueError] = CheckpointError, remedy: str = "") -> Iterator[None]:
    """Whatever goes wrong with a file's values inside becomes one `error` that begins with `where` and ends with
    `remedy`; one that is an `error` already stays as it is."""
    try:
        yield
    except error:
        raise
    except KeyError as fault:
        raise error(f"{where}: {fault.args[0] if fault.args else '?'!r:.80} is missing{remedy}") from None
    except FAULTS as fault:
        raise error(f"{where}: {one_line(fault)}{remedy}") from None


def one_line(fault: Exception) -> str:
    """What an error says, in one line that is not endless."""
    told = " ".join(str(fault).split()) or type(fault).__name__
    return told if len(told) <= 600 else told[:600] + " ..."


def find_settings(folder: Path) -> dict[Path, Any]:
    """What a checkpoint says of its images and actions, unchecked, by the file that says it: none, one or two.

    Raises CheckpointError as read_json does.
    """
    found = {}
    plain, nested = folder / SETTINGS_FILE, folder / PROCESSOR_FILE
    if plain.is_file():
        found[plain] = read_json(plain)
    if nested.is_file():
        content = read_json(nested)
        settings = content.get("image_processor") if isinstance(content, Mapping) else None
        if isinstance(settings, Mapping):
            found[nested] = settings
    return found


def flag(values: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """A value of a JSON object. Raises TypeError for anything but true and false, KeyError as number does."""
    value = _value(values, name, default)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.80}, not true or false")
    return value


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within a JSON object, empty if it is absent or null. Raises TypeError for anything else."""
    value = values.get(name)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r:.80}, not an object")
    return value


def text(values: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """As number, for text."""
    value = _value(values, name, default)
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r:.80}, not text")
    return value


def number(
    values: Mapping[str, Any],
    name: str,
    default: float | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """A value of a JSON object. Raises KeyError where there is neither it nor a default, TypeError for anything but a
    finite number, ValueError for one outside of least to most."""
    value = _value(values, name, default)
    if not is_number(value):
        raise TypeError(f"{name} is {value!r:.80}, not a number")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {_range(least, most)}, got {value:g}")
    return float(value)


def whole(
    values: Mapping[str, Any],
    name: str,
    default: int | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> int:
    """As number, for a whole one."""
    value = _value(values, name, default)
    if not is_number(value):
        raise TypeError(f"{name} is {value!r:.80}, not a number")
    if value != int(value):
        raise TypeError(f"{name} is {value!r}, not a whole number")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {_range(least, most)}, got {value!r:.80}")
    return int(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number that 64 bits can hold, as JSON has them."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**64
    return isinstance(value, float) and math.isfinite(value)


def table(raw: Any, name: str, width: int | None = None) -> np.ndarray:
    """(rows, width) float64 of a list of rows of numbers; width None: that of the first row.

    Raises ValueError for rows of several lengths and for anything but finite numbers in them.
    """
    import numpy as np

    if not isinstance(raw, list) or not all(isinstance(row, list) for row in raw):
        raise ValueError(f"{name}: expected a table of numbers, a list of rows, got {raw!r:.80}")
    width = (len(raw[0]) if raw else 0) if width is None else width
    for place, row in enumerate(raw):
        if len(row) != width:
            raise ValueError(f"{name} is ragged: expected rows of {width} numbers, got {len(row)} in row {place}")
        # NumPy would take text for numbers too, and reserve the longest text's size for every cell.
        if not all(map(is_number, row)):
            wrong = next(value for value in row if not is_number(value))
            raise ValueError(f"{name}: row {place}: expected finite numbers, got {wrong!r:.80}")
    return np.array(raw, dtype=np.float64).reshape(len(raw), width)


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if the file is what pointer_fault tells of."""
    fault = pointer_fault(path)
    if fault:
        raise CheckpointError(fault)


def pointer_fault(path: Path) -> str | None:
    """What is wrong with a file that git-lfs has not fetched, and the remedy; None for any other."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) != LFS_POINTER:
            return None
    return f"{path} is a git-lfs pointer, not the file: run `git lfs install` and `git lfs pull` in {path.parent}"


def _value(values: Mapping[str, Any], name: str, default: Any) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"expected an object with {name}, got {values!r:.80}")
    return values[name] if default is None else values.get(name, default)


def _range(least: float, most: float) -> str:
    if most == math.inf:
        return f"{least} or more"
    return f"{least} to {most}"


def _refuse_strange(path: Path, error: type[ValueError]) -> None:
    # A pipe would be waited for, and a device has no end.
    if path.exists() and not path.is_file():
        raise error(f"{path}: expected a file, and it is none")
    if fault := pointer_fault(path):
        raise error(fault)


def _check_depth(data: bytes) -> None:
    """Raises ValueError for more than DEPTH lists and objects in each other; all loops are the library's."""
    # Without escapes, what stands between two quotation marks is text.
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _PLAIN)
    marks = _QUOTED.sub(b"", marks).translate(_ROUND, b'"')
    for _ in range(DEPTH):
        marks = marks.replace(b"[]", b"")
    # What is left is too deep, or was never closed.
    if b"[]" in marks or marks.count(b"[") > DEPTH:
        raise ValueError(f"expected at most {DEPTH} lists and objects in each other, got more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return found


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {written:.40}")
    return value


def _integer(written: str) -> int:
    # Python needs a square of the digits' time.
    value = int(written) if len(written) <= 20 else 2**64
    if not is_number(value):
        raise ValueError(f"expected numbers of at most 64 bits, got {written:.40}")
    return value
