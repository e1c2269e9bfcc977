"""Files and folders that appear whole or not at all, and folders that one process at a time writes.

What is made has a name of its own beside the final one, `.NAME-xxxxxxxx.partial`, is on the disk before it is renamed,
and the rename is on the disk before its maker goes on: neither a kill nor a power cut leaves half of it under the final
name. Modes are what the umask makes of them.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"
PARTIAL = ".partial"
# What the file system says that has no locks, as some that are mounted over a network.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL, errno.ENOSYS)


@contextmanager
def whole_folder(folder: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A sibling that becomes `folder` on success and vanishes on any failure, SIGTERM in a command included.

    folder: absent or empty. What a process that was killed left of an earlier attempt is removed. Raises OSError if the
    disk has less than num_bytes free or becomes full, ValueError while another process is making the same folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes:
        message = f"{folder.parent} has {free / 2**30:.1f} GiB free; {folder.name} takes {num_bytes / 2**30:.1f} GiB"
        raise OSError(errno.ENOSPC, message)
    partial, handle = _begin(folder)
    try:
        yield partial
        publish(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            raise OSError(errno.ENOSPC, f"{folder} could not be written, nothing of it is left: {error}") from error
        raise
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name of a file for the caller to write, which becomes `path` on success and vanishes on any failure.

    The name ends as path does. An earlier file stays until then. path's folder is made. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{PARTIAL}{path.suffix}")
    try:
        yield partial
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all. Its folder is made. Raises OSError."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def publish(partial: Path, final: Path) -> None:
    """Give a file or folder its name, contents and name on the disk before this returns. Raises OSError."""
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if partial.is_file():
        _sync(partial)
    os.replace(partial, final)
    _sync(final.parent)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; it ends with the process, however that ends.

    Raises ValueError that tells who holds it if another does. Where the file system has
    no locks, a warning says so.
    """
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder / LOCK_FILE)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(handle)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def refuse_used(out: Path) -> None:
    """Raises ValueError for a folder that holds something, and for a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; remove it or choose another folder")


def is_fresh(folder: Path) -> bool:
    """Whether a folder is absent, or holds nothing but its lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir()))


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of a file."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _hold(handle):
                holder = os.pread(handle, 256, 0).decode(errors="replace").strip() or "another process"
                raise ValueError(f"{path.parent} is being written by {holder}: wait until it ends, or stop it")
            # Who held it before may have removed the file since it was opened.
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _hold(handle: int) -> bool:
    """Take the lock of an open file or folder; False if another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"no locks here, two processes at once would not be noticed: {error}", stacklevel=3)
    return True


def _begin(folder: Path) -> tuple[Path, int]:
    """A new sibling and a descriptor that holds its lock; siblings that nobody holds are removed."""
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        # Until the new folder has its lock, nobody else may look which ones have none.
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            can_lock = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            can_lock = False
        if can_lock:
            for left in folder.parent.glob(f".{glob.escape(folder.name)}-????????{PARTIAL}"):
                _sweep(left, folder)
        partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}{PARTIAL}")
        partial.mkdir()
        handle = os.open(partial, os.O_RDONLY)
        if can_lock:
            _hold(handle)
        return partial, handle
    finally:
        os.close(parent)


def _sweep(left: Path, folder: Path) -> None:
    handle = os.open(left, os.O_RDONLY)
    try:
        if not _hold(handle):
            raise ValueError(f"{folder} is being written by another process, as {left.name}: wait until it ends")
        shutil.rmtree(left)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do it for folders.
        if not (path.is_dir() and error.errno in NO_LOCKS):
            raise
    finally:
        os.close(handle)
