"""The folder of a run, locked so that one run at a time writes into it."""

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastroute._files import remove_temporaries
from fastroute.training.distributed import broadcast_from_rank_zero, is_main

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_threads: dict[Path, int] = {}
"""The thread of this process that holds each folder."""
_locks: set[int] = set()
"""Descriptors of the locks that this process holds or requests."""


class FolderInUse(OSError):
    """Raised when another run writes into the folder."""


def new_folder(folder: str | Path) -> Path:
    """Make a folder that does not exist yet, as two runs may start in one second.

    Args:
        folder: its path, to which -2, -3, … is appended if it exists.

    Returns:
        its path.

    Raises:
        OSError: it cannot be made.
    """
    for count in itertools.count(1):
        new = Path(folder) if count == 1 else Path(f"{folder}-{count}")
        try:
            new.mkdir(parents=True)
            return new
        except FileExistsError:
            continue


def local_path(path: str | Path, name: str, utf_8: bool = True) -> Path:
    """Make a path absolute, as Lightning takes a relative one such as `http_runs` or `file:` for a URL.

    Args:
        path: as given.
        name: the argument that it was given as, for messages.
        utf_8: whether the path must be in UTF-8, as for loggers.

    Returns:
        the absolute path.

    Raises:
        ValueError: the absolute path still looks like a URL, or is not in UTF-8 and must be.
    """
    path = Path(path).absolute()
    if "::" in str(path):
        raise ValueError(f"{name} is {path}; a path that contains '::' is taken for a URL: choose another name")
    try:
        if utf_8:
            str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {path}; TensorBoard needs a path in UTF-8: rename it") from None
    return path


@contextlib.contextmanager
def run_folder(folder: str | Path) -> Iterator[None]:
    """Make a run's folder, lock it for the block, and remove temporary files that killed runs left in it.

    The lock belongs to rank 0, and the system releases it when that process ends, however it ends. Its child processes
    do not hold it; a rank 0 that outlives its `torchrun` does. The block is reentrant within a thread. On a file system
    without locks, the run continues with a warning.

    Args:
        folder: made if it is missing; removed at the end if it is empty.

    Raises:
        FolderInUse: another run is there.
        OSError: it cannot be made.
    """
    folder, refusal = Path(folder).resolve(), None
    with contextlib.ExitStack() as held:
        if is_main():
            try:
                held.enter_context(_held(folder))
            except OSError as error:
                refusal = error
        refusal = broadcast_from_rank_zero(refusal)  # so that all processes end with the same message
        if refusal is not None:
            raise refusal
        yield


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    if _threads.get(folder) == threading.get_ident():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK) as locked:
        _threads[folder], process = threading.get_ident(), os.getpid()
        try:
            if locked:
                remove_temporaries(folder)
            yield
        finally:
            if os.getpid() == process:  # and not a fork of it
                del _threads[folder]
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()  # which fails if there are files


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file and write the owner into it; yield False if the file system has no locks.

    The lock is `flock`'s: a process loses one of `fcntl.lockf` as soon as it closes any descriptor of the file, as it
    does when it copies the folder.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(file)
        try:
            locked = _lock(file, path)
            if not _is_at(file, path):
                continue  # the previous run has just removed it
            if locked:
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield locked
            return
        finally:
            if file in _locks:
                _locks.remove(file)
                os.close(file)


def _lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        raise FolderInUse(
            f"output is {path.parent}; another run writes into it, {owner}: wait until it ends, or choose another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"output is {path.parent}; its file system has no locks ({error.strerror}): do not start another run there",
            stacklevel=1,
        )
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """Close the locks in a forked process, such as a worker: a lock lasts until its last descriptor is closed."""
    for file in _locks:
        os.close(file)
    _locks.clear()
    _threads.clear()


os.register_at_fork(after_in_child=_close_in_child)
