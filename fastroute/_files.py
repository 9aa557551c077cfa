"""Files that are written whole or not at all, and files of tensors that are checked before they are used."""

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
    """The bytes of a file are not those that were written."""


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", earlier: Path | None = None, **options) -> Iterator[IO]:
    """A new file, which takes the place of `path` at the end of the block, whole; after an error nothing has changed.

    It is written beside `path`, under a name of its own, since a rename is at once only within a file system.

    Args:
        path: the file.
        mode: of writing; like further options, for `open`.
        earlier: where the file that is replaced stays; None keeps it nowhere.
    """
    temporary = _temporary(path)
    try:
        with temporary.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if earlier is not None and path.is_file():
            _link_over(path, earlier)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _link_over(source: Path, target: Path) -> None:
    """Give a file a second name, at once; where there are no such links, it only has the second name then."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        os.replace(source, target)
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def copy_over(source: Path, target: Path) -> None:
    """Give a file a second name, at once; where there are no such links, a copy has it."""
    temporary = _temporary(target)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed within `replacing` have left in a folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def checked(path: str | Path) -> Iterator[BinaryIO]:
    """A file of tensors to read, once its checksums agree.

    A file of `torch.save` is a zip with a checksum for each of its parts, which `torch.load` itself does not look at.
    For formats without any, `write_digest` puts one beside the file; without it, such a file is taken as it is.

    Raises:
        DamagedFile: a checksum does not agree.
    """
    path = Path(path)
    with path.open("rb") as file:  # once: what is checked is what is read, also where another file takes its place
        _check_digest(path, file)
        if path.suffix != ".safetensors" and file.read(4) == b"PK\x03\x04":  # as PyTorch tells a zip
            _check_zip(file)
        file.seek(0)
        yield file


def read_tensors(path: str | Path) -> object:
    """What a file of `torch.save` or a `.safetensors` holds, on the CPU; see `checked`.

    Raises:
        DamagedFile: a checksum does not agree.
        Exception: whatever a reader does with bytes that are not its own.
    """
    with checked(path) as file:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load

            return load(file.read())
        return torch.load(file, map_location="cpu", weights_only=True)


def write_digest(path: Path) -> None:
    """Write the SHA-256 of a file beside it, as `sha256sum` does."""
    with path.open("rb") as file, replacing(digest_path(path)) as beside:
        beside.write(f"{_sha256(file)}  {path.name}\n")


def digest_path(path: Path) -> Path:
    """Where the digest of a file lies: its name, with `.sha256` added."""
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
                raise zipfile.BadZipFile("two of its parts have one name")
            for part in parts:
                if part.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{part.filename} is compressed, which PyTorch does not do")
                with archive.open(part) as stream:  # which compares the checksum at the end
                    while stream.read(1 << 20):
                        pass
    except Exception as error:  # zipfile raises errors of many types for bytes that are not its own
        raise DamagedFile(f"the file is damaged: {in_a_line(error)}") from error
