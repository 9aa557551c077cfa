"""Atomic file writes, and files of tensors that are verified before use."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import torch

from fastroute._errors import in_a_line

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


class DamagedFile(ValueError):
    """Raised where the bytes of a file are not those that were written."""


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", earlier: Path | None = None, **options) -> Iterator[IO]:
    """Write a new file that atomically replaces `path` at the end of the block; after an error nothing has changed.

    The new file is written beside `path` under a temporary name, since a rename is atomic only within a file system.

    Args:
        path: the file to replace.
        mode: passed to `open`, as are further options.
        earlier: path under which the replaced file is kept; None discards it.

    Yields:
        The open temporary file.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """
    temporary = _temporary(path)
    with naming(path, temporary):
        try:
            with temporary.open(mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if earlier is not None and path.is_file():
                _link_over(path, earlier)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name a file in the system errors of the block that name none, as of a full disk, or the temporary one.

    Args:
        path: of the file.
        temporary: that takes its place until it is complete.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary and str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path, name: str) -> None:
    """Check that a file can be written, before the work that fills it.

    Args:
        path: of the file, which may exist.
        name: of the argument, for the message.

    Raises:
        FileNotFoundError: its folder, or that of the file it links to, is missing.
        IsADirectoryError: it is a folder itself.
        PermissionError: the file, or the folder it is to be in, cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{name} is {path}; it is a folder: name a file")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{name} is {path}; there is no such folder: make it first")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise PermissionError(f"{name} is {path}; this user cannot write there")


@contextlib.contextmanager
def text_output(path: Path, errors: str = "surrogateescape") -> Iterator[IO[str]]:
    """Open a text file in UTF-8 that replaces `path`, or the file that it links to, at the end of the block.

    Devices, pipes, and files in a folder without write permission are written in place instead.

    Args:
        path: of the file.
        errors: that of `open`; by default for file names, which may be no valid text.
    """
    options = {"newline": "", "encoding": "utf-8", "errors": errors}
    target = path.resolve()
    special = path.exists() and (not path.is_file() or os.path.ismount(target))
    if special or not os.access(target.parent, os.W_OK):
        with path.open("w", **options) as file:
            yield file
        return
    with replacing(target, **options) as file:
        if target.exists():
            os.chmod(file.name, target.stat().st_mode)
        yield file


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replace a text file at once; see `text_output`."""
    with text_output(path, errors) as file:
        file.write(text)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _link_over(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`, atomically; on a file system without hard links, rename it instead."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        os.replace(source, target)
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two links to one file does nothing


def copy_over(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, atomically; on a file system without hard links, a copy."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files left in a folder by processes that were killed within `replacing`."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def checked(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file of tensors for reading, after verifying its checksums.

    A file written by `torch.save` is a zip with a checksum for each part, which `torch.load` does not verify. For
    formats without checksums, `write_digest` puts one beside the file; without that, such a file is not verified.

    Raises:
        DamagedFile: a checksum does not match.
    """
    path = Path(path)
    with path.open("rb") as file:  # opened once: the bytes verified are the bytes read, even if the file is replaced
        _check_digest(path, file)
        if path.suffix != ".safetensors" and file.read(4) == b"PK\x03\x04":  # how PyTorch recognises a zip
            _check_zip(file)
        file.seek(0)
        yield file


def read_tensors(path: str | Path) -> object:
    """Load a file of `torch.save` or a `.safetensors` file to the CPU, after verifying it with `checked`.

    Raises:
        DamagedFile: a checksum does not match.
        Exception: any error of the reader on bytes of another format.
    """
    with checked(path) as file:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load

            return load(file.read())
        start = file.read(4)
        if not start:
            raise DamagedFile("the file is empty")
        if start != b"PK\x03\x04" and not start.startswith(b"\x80"):  # neither a zip nor a pickle
            raise ValueError("torch.save did not write this file")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def write_digest(path: Path) -> None:
    """Write the SHA-256 of a file beside it, in the format of `sha256sum`."""
    with path.open("rb") as file, replacing(digest_path(path)) as beside:
        beside.write(f"{_sha256(file)}  {path.name}\n")


def digest_path(path: Path) -> Path:
    """Return the path of a file's digest: its name with `.sha256` appended."""
    return path.with_name(path.name + ".sha256")


def _check_digest(path: Path, file: BinaryIO) -> None:
    beside = digest_path(path)
    if not beside.is_file():
        return
    found = beside.read_bytes().split(maxsplit=1)[:1]
    if found != [_sha256(file).encode()]:
        raise DamagedFile(f"the file is damaged: its SHA-256 is not the one in {beside.name}")
    file.seek(0)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_zip(file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if len({part.filename for part in parts}) < len(parts):
                raise zipfile.BadZipFile("two of its parts have the same name")
            for part in parts:
                if part.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{part.filename} is compressed, which PyTorch does not do")
                with archive.open(part) as stream:  # reading to the end verifies the checksum
                    while stream.read(1 << 20):
                        pass
    except Exception as error:  # zipfile raises errors of many types on bytes that are not a zip
        raise DamagedFile(f"the file is damaged: {in_a_line(error)}") from error
