"""tokenizer.json is tried in a process of its own, whatever it does there."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from xr0_engine.robot import tokenizer_file
from xr0_engine.robot.tokenizer_file import read_tokenizer
from xr0_engine.robot.tokenizer_process import Panic, panics
from xr0_engine.types import CheckpointError


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_file, "_usable", set())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({mark: index for index, mark in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_is_tried_once(path, monkeypatch):
    tries = []
    monkeypatch.setattr(tokenizer_file, "_fault", lambda path: tries.append(path))
    assert read_tokenizer(path).get_vocab_size() == 256
    read_tokenizer(path)
    assert len(tries) == 1
    # Another process on this machine knows it from the cache.
    tokenizer_file._usable.clear()
    read_tokenizer(path)
    assert len(tries) == 1
    # Another content is another file.
    path.write_text(path.read_text() + "\n")
    read_tokenizer(path)
    assert len(tries) == 2


def test_a_cache_that_cannot_be_written_is_no_matter(path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(path))
    assert read_tokenizer(path).get_vocab_size() == 256


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os; os.abort()", "ends the process that reads it, by signal 6"),
        ("import time; time.sleep(60)", "has not read and tried it within 2 s"),
        ("raise MemoryError('too much')", "fails on it: MemoryError: too much"),
        ("print('\"the library panics: index 7\"')", "the library panics: index 7"),
    ],
    ids=["abort", "hang", "memory", "panic"],
)
def test_whatever_a_file_does_is_an_error(path, tmp_path, monkeypatch, program, told):
    # A library that does it.
    fake = tmp_path / "path" / "tokenizers"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(program)
    monkeypatch.syspath_prepend(str(fake.parent))
    monkeypatch.setattr(tokenizer_file, "LIMIT_S", 2.0)
    if "print" in program:
        (fake / "__init__.py").write_text(program + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)")
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json is no tokenizer: .*{told}"):
        read_tokenizer(path)
    assert not list((tmp_path / "cache").rglob("*-*"))


def test_a_panic_is_an_error():
    class PanicException(BaseException):
        pass

    with pytest.raises(Panic, match="index 7"), panics():
        raise PanicException("index 7")
    with pytest.raises(KeyboardInterrupt), panics():
        raise KeyboardInterrupt


@pytest.mark.parametrize("content", ["[1]", '{"model": NaN}', "[" * 1000], ids=["list", "NaN", "deep"])
def test_what_is_no_object_is_not_even_tried(path, monkeypatch, content):
    monkeypatch.setattr(tokenizer_file, "_fault", lambda path: pytest.fail("it was tried"))
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        read_tokenizer(path)


def test_a_library_that_takes_forever_for_a_text_is_noticed(path, monkeypatch):
    content = json.loads(path.read_text())
    # Every `a` becomes a megabyte.
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000}
    path.write_text(json.dumps(content))
    monkeypatch.setattr(tokenizer_file, "LIMIT_S", 3.0)
    with pytest.raises(CheckpointError, match=r"is no tokenizer"):
        read_tokenizer(path)
