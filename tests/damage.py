"""Random damage to files: of their values, of their text, of their bytes. For tests/fuzz_files.py."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-300, 1e-30, 1e38, 3e38, -1e308, 1e12, -1e12, 10**9, 10**12),
    *(
        2**31,
        2**63,
        10**18,
        10**30,
        "",
        "no",
        "true",
        "1",
        "NaN",
        "\x00",
        "\u202e",
        "../../etc",
        "/dev/zero",
        "😀" * 99,
    ),
    *([], {}, [[]], [None], [1], ["a"], {"a": 1}, [[[[1]]]], [0] * 99, {"a": {"b": {"c": []}}}),
]
"""Instead of a value."""
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "[" * 5000, '{"a":' * 2000, "[" * 70 + "]" * 70, "'x'", "01")
"""Instead of a value, as they stand in a text."""
YAML_LINES = (
    "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n",
    *(
        "a: &a [*a]\n",
        "<<: *x\n",
        "? [1]\n: 2\n",
        "- " * 300 + "1\n",
        "!!python/name:os.system x: 1\n",
        "name: !!int x\n",
    ),
    *(
        "name: .nan\n",
        "name: 1:59:59.5\n",
        "name: 2020-99-99\n",
        "%YAML 9\n",
        "---\n",
        "...\n",
        "\t- x\n",
        "{" * 90,
        "|\n x\n",
    ),
)
MARK = "\ue000"
"""In a text, where a raw value is to stand: a character of nobody's."""
KEYS = ("", "a", "name", "\x00", "__class__", "0")


def damaged(content: bytes, name: str, rng: random.Random) -> bytes:
    """The content of a file of that name, with something wrong about it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if name.endswith(".json"):
            content = _json(content, rng)
        elif name.endswith(".jsonl"):
            content = _lines(content, rng)
        elif name.endswith(".safetensors"):
            content = _safetensors(content, rng)
        elif name.endswith(".parquet"):
            content = _parquet(content, rng)
        elif name.endswith((".yaml", ".py")):
            content = _text(content, rng)
        else:
            content = _bytes(content, rng)
    return content


def _json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return _bytes(content, rng)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    value, raw = _value(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace('": ', '": 1, "x": ', 1).replace("{", '{"x": 2, ', 1)
    return text.replace(json.dumps(MARK), raw).encode()


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.random()
    if kind < 0.75:
        lines[at] = _json(lines[at], rng)
    elif kind < 0.85:
        del lines[at]
    elif kind < 0.95:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        return _bytes(content, rng)
    return b"\n".join(lines)


def _value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """The value with one place in it changed, and what MARK stands for. Deep places are as likely as broad ones."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        copy = dict(value)
        what = rng.random()
        if what < 0.06:
            del copy[key]
        elif what < 0.1:
            copy[rng.choice(KEYS)] = copy.pop(key)
        elif what < 0.13:
            copy[key] = copy[rng.choice(list(value))]
        else:
            copy[key], raw = _value(value[key], rng)
            return copy, raw
        return copy, ""
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        list_copy = list(value)
        what = rng.random()
        if what < 0.08:
            del list_copy[at]
        elif what < 0.14:
            list_copy.insert(at, list_copy[rng.randrange(len(value))])
        elif what < 0.17:
            list_copy = list_copy * rng.choice((2, 50))
        else:
            list_copy[at], raw = _value(value[at], rng)
            return list_copy, raw
        return list_copy, ""
    if rng.random() < 0.15:
        return MARK, rng.choice(RAW)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        factor = rng.choice((0, -1, 2, 10, 1000, 1e6, 1e12, 1e30, 0.5, 1 + 1e-9))
        if isinstance(value, int):
            # Some are beyond any float already.
            return (value * int(factor) if factor == int(factor) else value // 2), ""
        return value * factor, ""
    return rng.choice(HOSTILE), ""


def _text(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode(errors="replace").splitlines(keepends=True)
    at = rng.randrange(len(lines)) if lines else 0
    what = rng.random()
    if what < 0.35 and lines and ":" in lines[at]:
        value = rng.choice([*(json.dumps(item) for item in HOSTILE), *RAW, "*a", "&a x", ".inf", ".nan", "1e3", "~"])
        lines[at] = lines[at].split(":", 1)[0] + ": " + value + "\n"
    elif what < 0.5:
        lines.insert(at, rng.choice(YAML_LINES))
    elif what < 0.6 and lines:
        del lines[at]
    elif what < 0.7 and lines:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        return _bytes(content, rng)
    return "".join(lines).encode()


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    what = rng.random()
    at = rng.randrange(len(data)) if data else 0
    if what < 0.2:
        return bytes(data[:at])
    if what < 0.3:
        return bytes(data[:at] + data[at + rng.choice((1, 2, 100)) :])
    if what < 0.4:
        return bytes(data[:at]) + rng.choice(RAW).encode() + bytes(data[at:])
    if what < 0.45:
        return bytes(data[:at]) + rng.randbytes(16) + bytes(data[at:])
    if what < 0.48:
        # As many times as would cost something where each time costs something.
        piece = bytes(data[at : at + rng.choice((2, 4, 8, 16, 64, 512))])
        return bytes(data[:at]) + piece * rng.choice((2, 50, 3000, 50_000)) + bytes(data[at:])
    if what < 0.53:
        return rng.choice((b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf" + content, b"null", b"[]", b"0", b'"x"', b"{}"))
    for _ in range(rng.choice((1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256) if rng.random() < 0.5 else rng.choice(b'[]{}",:0-9eE\\')
    return bytes(data)


def _parquet(content: bytes, rng: random.Random) -> bytes:
    """Of a table's columns: their values, kinds, names and rows, or of the file's bytes."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    if rng.random() < 0.3:
        return _bytes(content, rng)
    try:
        table = pq.read_table(io.BytesIO(content))
    except (OSError, ValueError):
        return _bytes(content, rng)
    at = rng.randrange(table.num_columns)
    name, values, what = table.column_names[at], table.column(at).to_pylist(), rng.random()
    if what < 0.1 and table.num_columns > 1:
        table = table.drop_columns([name])
    elif what < 0.15:
        table = table.rename_columns([each if each != name else rng.choice(KEYS) for each in table.column_names])
    elif what < 0.2:
        table = table.slice(rng.randrange(table.num_rows + 1))
    elif what < 0.25:
        table = pa.concat_tables([table] * rng.choice((2, 50)))
    else:
        if what < 0.6 and values:
            values[rng.randrange(len(values))] = _value(values[0], rng)[0]
        elif what < 0.7:
            values = [None] * len(values)
        else:
            values = [rng.choice(HOSTILE)] * len(values)
        try:
            column = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError):
            # Values of several kinds have no column: as text.
            column = pa.array([repr(value)[:99].encode("ascii", "replace").decode() for value in values])
        table = table.set_column(at, name, column)
    file = io.BytesIO()
    try:
        pq.write_table(table, file)
    except pa.ArrowException:
        return _bytes(content, rng)
    return file.getvalue()


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """Of the header's values, or of weights, in bfloat16."""
    if len(content) < 8 or rng.random() < 0.1:
        return _bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + size], bytearray(content[8 + size :])
    what = rng.random()
    if what < 0.5:
        header = _json(header, rng)
        return struct.pack("<Q", len(header)) + header + body
    if what < 0.6:
        return (
            struct.pack("<Q", rng.choice((0, 1, max(size - 1, 0), size + 1, 2**31, 2**63 - 1, 2**64 - 1)))
            + header
            + body
        )
    for _ in range(rng.choice((1, 10, 1000))):
        at = 2 * rng.randrange(max(1, len(body) // 2))
        body[at : at + 2] = struct.pack("<H", rng.choice((0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x0001, 0x7000)))
    return content[: 8 + size] + bytes(body)
