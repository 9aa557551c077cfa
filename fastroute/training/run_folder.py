"""The folder of a run, which one run at a time writes into."""

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
from fastroute.training.distributed import agreed, is_main

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_threads: dict[Path, int] = {}
"""The thread of this process that holds a folder."""
_locks: set[int] = set()
"""Descriptors of the locks that this process has or asks for."""


class FolderInUse(OSError):
    """Another run writes into the folder."""


def new_folder(folder: str | Path) -> Path:
    """Make a folder that there was not: `folder`, or with -2, -3, … added, as for two runs of one second."""
    for count in itertools.count(1):
        new = Path(folder) if count == 1 else Path(f"{folder}-{count}")
        try:
            new.mkdir(parents=True)
            return new
        except FileExistsError:
            continue


@contextlib.contextmanager
def run_folder(folder: str | Path) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it in the block; what killed runs left half written goes.

    The lock is the main process's, and the system takes it back when that process ends, however it ends: processes that
    it started do not hold it, and one that outlives the `torchrun` that started it does. A thread may enter the block
    again within it. Where the file system has no locks, the run goes on with a warning.

    Args:
        folder: made if it is missing; one that stays empty goes again.

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
        refusal = agreed(refusal)  # so that all processes end with the same sentence
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
            if os.getpid() == process:  # and this is no copy of it
                del _threads[folder]
                (folder / LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()  # which leaves a folder with files alone


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which says who holds it; gives False where the file system has no locks.

    It is `flock`'s: of `fcntl.lockf`'s, a process loses its lock as soon as it closes any copy of the file, as it does
    when it copies the folder.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(file)
        try:
            locked = _lock(file, path)
            if not _is_at(file, path):
                continue  # the run before has removed it at its end, just now
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
            f"output is {path.parent}; another run writes into it, {owner}: wait for its end, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"output is {path.parent}; its file system has no locks ({error.strerror}): let no other run write there",
            stacklevel=1,
        )
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    """A copy of the process, such as a worker, does not keep the lock, which lasts until its last copy is closed."""
    for file in _locks:
        os.close(file)
    _locks.clear()
    _threads.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
