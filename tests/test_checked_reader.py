"""The checked reader: what a file may cost, and that whatever is wrong with it is one error that names it."""

from __future__ import annotations

import json
import os
import time

import pytest

from xr0_engine import files
from xr0_engine.files import (
    DEPTH,
    flag,
    json_lines,
    number,
    parse_json,
    read_json,
    read_yaml,
    reading,
    table,
    text,
    whole,
)
from xr0_engine.types import CheckpointError, FileError

SOON_S = 5.0
"""What is refused before any work; a machine that does other things too."""


@pytest.fixture
def file(tmp_path):
    def write(content, name="x.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"a": NaN}', "expected finite numbers, got NaN"),
        ('{"a": -Infinity}', "expected finite numbers, got -Infinity"),
        ('{"a": 1e999}', "expected finite numbers, got 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "expected numbers of at most 64 bits"),
        ('{"a": 18446744073709551616}', "expected numbers of at most 64 bits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "lists and objects in each other"),
        ('{"a":' * 100_000, "lists and objects in each other"),
        ("[1, 2", "delimiter"),
        (b"\xff\xfe[\x001\x00]\x00", "utf-8"),
        (b"\xef\xbb\xbf[1]", "BOM"),
    ],
    ids=[
        "NaN", "infinity", "overflow", "digits", "65 bits", "twice", "surrogate", "deep", "deeper", "cut", "UTF-16",
        "BOM",
    ],
)  # fmt: skip
def test_what_json_may_not_hold(file, content, told):
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"x\.json is not valid JSON: .*{told}"):
        read_json(file(content))
    assert time.monotonic() - begin < SOON_S


@pytest.mark.parametrize(
    "value",
    [
        [1, -1.5e-300, 2**64 - 1, -(2**63), True, None],
        {"a": "[[[[{{{\"\\", "b\\": '"]', "NaN": "1e999", "c": ["\\\\", "😀"]},
        [[[]], [[], []], {"a": {"b": []}}],
    ],
    ids=["numbers", "brackets within text", "empty ones"],
)  # fmt: skip
def test_what_json_may_hold_is_read_as_python_reads_it(value):
    for written in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(written.encode()) == json.loads(written) == value


def test_as_deep_as_allowed_is_read():
    assert parse_json(b"[" * DEPTH + b"]" * DEPTH) is not None


def test_bytes_and_values_are_counted_first(file, monkeypatch):
    path = file("[" + "1," * 100 + "1]")
    with pytest.raises(FileError, match="expected at most 50 values"):
        read_json(path, FileError, most_values=50)
    monkeypatch.setattr(files, "JSON_BYTES", 1)
    with pytest.raises(FileError, match=r"x\.json: expected at most 0 KiB"):
        read_json(path, FileError, most_bytes=100)


def test_no_pipe_and_no_device_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(CheckpointError, match=r"pipe\.json: expected a file"):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"zero\.json: expected a file"):
        read_json(tmp_path / "zero.json")


def test_lines_are_read_up_to_one_that_was_cut_off(file):
    path = file('{"a": 1}\n\n{"a": 2}\n{"a"', "x.jsonl")
    assert list(json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(("line", "told"), [("[1]", "expected an object"), ('{"a": NaN}', "finite"), ("{", "JSON")])
def test_a_wrong_line_is_named(file, line, told):
    with pytest.raises(FileError, match=rf"x\.jsonl, line 2: .*{told}"):
        list(json_lines(file('{"a": 1}\n' + line + "\n", "x.jsonl"), FileError))


def test_a_line_has_an_end(file, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 10)
    with pytest.raises(FileError, match="line 1: expected at most 10 bytes"):
        list(json_lines(file('{"a": "' + "x" * 20 + '"}\n', "x.jsonl"), FileError))


TENFOLD = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (TENFOLD, "expected at most 16384 values in line 4"),
        ("a: &a [*a]", "the alias 'a' has no end"),
        ("- " * 100 + "1", "expected at most 64 levels"),
        ("[" * 300, "expected at most 64 levels"),
        ("a: 1\na: 2", "the key 'a' stands twice in line 2"),
        ("a: .nan", "expected finite numbers"),
        ("a: -.inf", "expected finite numbers"),
        ("a: " + "9" * 5000, "expected finite numbers of 64 bits"),
        ("a: " + ":".join(["59"] * 200) + ".5", "expected finite numbers of 64 bits"),
        ("a: !!int ''", "expected no tags"),
        ("a: !!python/object:os.system x", "expected no tags"),
        ("a: 2020-99-99", "month"),
        ("? [1, 2]\n: 3", "unhashable"),
        (b"a: \xff", "utf-8"),
        ("a: [1", "expected"),
    ],
    ids=[
        "aliases", "alias of itself", "deep blocks", "deep lists", "twice", "NaN", "infinity", "digits", "sexagesimal",
        "tag", "object", "date", "key", "bytes", "cut",
    ],
)  # fmt: skip
def test_what_yaml_may_not_hold(file, content, told):
    begin = time.monotonic()
    with pytest.raises(FileError, match=rf"x\.yaml is not valid YAML: .*{told}") as caught:
        read_yaml(file(content, "x.yaml"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < SOON_S


def test_aliases_that_cost_little_are_read(file):
    found = read_yaml(file("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 0x10, z: 1.5}", "x.yaml"))
    assert found == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 16, "z": 1.5}}


VALUES = {"flag": "no", "text": 1.5, "number": True, "large": 1e12, "half": 0.5, "huge": 10**400}


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (lambda: flag(VALUES, "flag"), "flag is 'no', not true or false"),
        (lambda: text(VALUES, "text"), "text is 1.5, not text"),
        (lambda: number(VALUES, "number"), "number is True, not a number"),
        (lambda: number(VALUES, "huge"), "huge is 1000.*, not a number"),
        (lambda: number(VALUES, "large", least=0, most=10), "large: expected 0 to 10, got 1e.12"),
        (lambda: whole(VALUES, "half"), "half is 0.5, not a whole number"),
        (lambda: whole(VALUES, "half", least=1), "half is 0.5, not a whole number"),
        (lambda: whole(VALUES, "large", most=5), "large: expected .*5, got"),
        (lambda: whole(VALUES, "none"), "'none' is missing"),
        (lambda: whole([], "none"), "expected an object with none"),
        (lambda: table([[1, 2], [3]], "rows"), "rows is ragged: expected rows of 2 numbers, got 1 in row 1"),
        (lambda: table([["1"]], "rows"), "rows: row 0: expected finite numbers, got '1'"),
        (lambda: table({}, "rows"), "rows: expected a table of numbers"),
        (lambda: {}["a"], "'a' is missing"),
        (lambda: 1 // 0, "division"),
        (lambda: "".no_such_thing, "no attribute"),
    ],
)
def test_every_mistake_in_a_file_is_one_error(read, told):
    with pytest.raises(FileError, match=f"^the file.*{told}.*; mend it$"), reading("the file", FileError, "; mend it"):
        read()


def test_whole_numbers_keep_their_digits():
    assert whole({"a": 2**63 + 1}, "a") == 2**63 + 1
    assert whole({"a": 10.0}, "a") == 10
    assert whole({}, "a", 7) == 7
