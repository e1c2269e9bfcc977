"""An export's files are those that were written: every sum is checked, once per version of a file."""

from __future__ import annotations

import os
import shutil

import pytest

from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.export.folder import export_onnx
from xr0_engine.exported import integrity
from xr0_engine.exported.integrity import check_files, remember
from xr0_engine.exported.manifest import ExportCase, Manifest, record_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def files(tmp_path):
    """Two files with their records, and nothing remembered of them."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "weights.data").write_bytes(b"a" * 1000)
    (folder / "vision.onnx").write_bytes(b"b" * 10)
    return {folder / name: record for name, record in record_files(folder, ["weights.data", "vision.onnx"]).items()}


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose sums were computed."""
    names: list[str] = []
    compute = integrity._compute

    def noted(paths):
        paths = list(paths)
        names.extend(path.name for path in paths)
        return compute(paths)

    monkeypatch.setattr(integrity, "_compute", noted)
    return names


def path_of(files, name):
    return next(path for path in files if path.name == name)


def test_every_file_is_read_once(files, read):
    for _ in range(3):
        check_files(files)
    assert sorted(read) == ["vision.onnx", "weights.data"]


def test_other_content_of_the_same_size_is_refused_also_after_it_was_right(files, read):
    check_files(files)
    weights = path_of(files, "weights.data")
    weights.write_bytes(b"c" * 1000)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"not as it was written: {weights}: .*xr0 export"):
            check_files(files)
    # Its own sum is remembered too, and is not that of the manifest.
    assert sorted(read) == ["vision.onnx", "weights.data", "weights.data"]
    weights.write_bytes(b"a" * 1000)
    check_files(files)


def test_times_that_were_set_back_do_not_deceive(files):
    check_files(files)
    weights = path_of(files, "weights.data")
    before = weights.stat()
    weights.write_bytes(b"c" * 1000)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="not as it was written"):
        check_files(files)


def test_another_file_in_its_place_is_another_version(files, tmp_path):
    check_files(files)
    weights = path_of(files, "weights.data")
    other = tmp_path / "other"
    other.write_bytes(b"c" * 1000)
    shutil.copystat(weights, other)
    os.replace(other, weights)
    with pytest.raises(ValueError, match="not as it was written"):
        check_files(files)


def test_a_file_that_was_just_written_is_known(files, read):
    remember(files)
    check_files(files)
    assert read == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"sha256": 3}', b"\xff"])
def test_a_note_that_is_broken_is_none(files, read, cache, content):
    check_files(files)
    for note in cache.iterdir():
        note.write_bytes(content)
    check_files(files)
    assert len(read) == 4


def test_without_a_place_to_remember_in_every_start_reads(files, read, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        check_files(files)
    assert len(read) == 4


def test_a_user_without_a_home_is_served(files, monkeypatch):
    monkeypatch.setattr(integrity, "cache_dir", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    check_files(files)


def test_an_engine_refuses_the_weights_of_another_export(tmp_path):
    case = ExportCase("libero", "libero_all", (64, 64))
    for name, seed in (("a", 1), ("b", 2)):
        init_checkpoint(tmp_path / f"{name}.checkpoint", seed=seed)
        export_onnx(tmp_path / f"{name}.checkpoint", case, "fp32", tmp_path / name, stages=["vision"])
    Engine.from_export(tmp_path / "a")
    shutil.copy(tmp_path / "b" / "weights.data", tmp_path / "a" / "weights.data")
    with pytest.raises(ValueError, match=r"a/weights\.data: another content than the SHA-256 sum"):
        Engine.from_export(tmp_path / "a")


def test_every_file_with_a_sum_counts(tmp_path):
    init_checkpoint(tmp_path / "checkpoint")
    case = ExportCase("libero", "libero_all", (64, 64))
    export_onnx(tmp_path / "checkpoint", case, "fp32", tmp_path / "export", stages=["vision"])
    names = Manifest.read(tmp_path / "export").files
    assert {"preprocessor_config.json", "config.json", "tokenizer.json", "vision.onnx", "weights.data"} <= set(names)
    file = tmp_path / "export" / "preprocessor_config.json"
    text = file.read_text()
    file.write_text(text.replace('"std": [[0.', '"std": [[9.', 1))
    assert file.stat().st_size == names["preprocessor_config.json"].bytes
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: another content"):
        Engine.from_export(tmp_path / "export")
