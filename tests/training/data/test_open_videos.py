"""Open files, shared by threads and not by processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.training.data.fixtures import encode_video, frame_number, numbered_frame, write_video
from xr0_engine.training.data import open_videos
from xr0_engine.training.data.decoder import Decoder
from xr0_engine.training.data.video import Clip

COUNT = 200
# Nobody is to wait this long: a test that would hang fails.
PATIENCE_S = 20


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("threads") / "v.mp4", range(COUNT))


@pytest.fixture
def pool(monkeypatch):
    fresh = open_videos._Pool()
    monkeypatch.setattr("xr0_engine.training.data.video.POOL", fresh)
    return fresh


def test_threads_at_once_in_one_file_have_a_decoder_each(video, pool, monkeypatch):
    """Training's and validation's episodes lie in one file, and both are read at the same time."""
    meeting = threading.Barrier(2, timeout=PATIENCE_S)
    used = []

    def at(decoder, time_s, tolerance_s):
        used.append(decoder)
        meeting.wait()
        return real(decoder, time_s, tolerance_s)

    real = Decoder.at
    monkeypatch.setattr(Decoder, "at", at)
    clips = [Clip(video, 0.0, COUNT, 30.0), Clip(video, 100 / 30, 100, 30.0)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda clip: frame_number(clip.read(7)), clips))
    assert found == [7, 107]
    assert len(set(map(id, used))) == 2


def test_threads_get_their_own_frames(video, pool):
    def read(number):
        clip, order = Clip(video, number * 50 / 30, 50, 30.0), np.random.default_rng(number).integers(0, 50, 100)
        return [frame_number(clip.read(int(frame))) - number * 50 for frame in order] == order.tolist()

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_a_thread_goes_on_in_its_own_decoder(video, pool):
    """Another's stands elsewhere in the file, and would seek at every frame."""
    with ThreadPoolExecutor(1) as other:
        with held(pool, video) as own:
            other.submit(Clip(video, 0.0, COUNT, 30.0).read, 50).result()
        assert pool._idle[-1].decoder is own
        other.submit(Clip(video, 0.0, COUNT, 30.0).read, 51).result()
        assert [idle.decoder is own for idle in pool._idle] == [True, False]


@contextmanager
def held(pool, path):
    """A decoder of a file in use, so that another thread needs one more."""
    identity = open_videos._identity(path)
    decoder = pool._take(path, identity)
    yield decoder
    pool._give(open_videos._Idle(identity, threading.get_ident(), decoder))


def test_open_files_are_bounded_over_all_threads(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(open_videos, "OPEN_FILES", 3)
    frame = [numbered_frame(5)] * 2
    paths = [encode_video(tmp_path / f"{number}.mp4", frame) for number in range(8)]
    opened = []
    closed = []
    real_init, real_close = Decoder.__init__, Decoder.close
    monkeypatch.setattr(Decoder, "__init__", lambda self, path: (opened.append(path), real_init(self, path))[1])
    monkeypatch.setattr(Decoder, "close", lambda self: (closed.append(self), real_close(self))[1])

    def read(path):
        return frame_number(Clip(path, 0.0, 2, 30.0).read(0))

    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(read, paths * 3)) == {5}
    assert len(opened) - len(closed) == len(pool._idle) <= 3
    assert pool._in_use == 0


def test_kept_open_is_what_was_used_last(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(open_videos, "OPEN_FILES", 2)
    paths = [encode_video(tmp_path / f"{number}.mp4", [numbered_frame(5)]) for number in range(3)]
    for number in (0, 1, 0, 2):
        Clip(paths[number], 0.0, 1, 30.0).read(0)
    assert [idle.identity[0] for idle in pool._idle] == [str(paths[0]), str(paths[2])]


def test_file_that_was_replaced_is_opened_anew(tmp_path, pool):
    path = encode_video(tmp_path / "v.mp4", [numbered_frame(5)])
    clip = Clip(path, 0.0, 1, 30.0)
    assert frame_number(clip.read(0)) == 5
    os.replace(encode_video(tmp_path / "other.mp4", [numbered_frame(9)]), path)
    assert frame_number(clip.read(0)) == 9
    assert len(pool._idle) == 1


def test_failure_to_open_leaves_no_trace(tmp_path, pool):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be opened"):
        Clip(tmp_path / "v.mp4", 0.0, 1, 30.0).read(0)
    assert (pool._in_use, pool._idle) == (0, [])


FORKING = """
import os, sys
from pathlib import Path
from tests.training.data.fixtures import frame_number
from xr0_engine.training.data.open_videos import POOL
from xr0_engine.training.data.video import Clip
clip = Clip(Path(sys.argv[1]), 0.0, 200, 30.0)
assert frame_number(clip.read(10)) == 10
child = os.fork()
if child == 0:
    opened = len(POOL._idle)
    found = [frame_number(clip.read(frame)) for frame in (150, 11, 190)]
    os._exit(0 if (opened, found) == (0, [150, 11, 190]) else 1)
assert os.waitpid(child, 0)[1] == 0
assert [frame_number(clip.read(frame)) for frame in (11, 12, 30)] == [11, 12, 30]
assert len(POOL._idle) == 1
"""


def test_a_fork_closes_nothing_of_its_parents(video, pool):
    """Closing waits for a decoder's threads, which a forked process has not."""
    Clip(video, 0.0, 200, 30.0).read(10)
    kept = weakref.ref(pool._idle[0].decoder)
    pool.forget()
    gc.collect()
    assert pool._idle == []
    assert kept() is not None


def test_forked_process_opens_its_own(video):
    command, root = [sys.executable, "-c", FORKING, str(video)], Path(__file__).parents[3]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
