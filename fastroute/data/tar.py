"""List the members of a tar file by its headers, at a bounded cost for damaged or hostile files.

Python's `tarfile` does not suit shards from unknown sources: it takes a damaged header for the end of the archive,
reads headers of any length into memory, and expands sparse files.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastroute._errors import printable

BLOCK = 512
MAX_HEADER = 2**20
"""The most bytes of a long name or of extended attributes."""
MAX_PADDING = 2**20
"""The most bytes of zeros after the end; by default archives are padded to a multiple of 10 KiB."""

FILE, FOLDER = "file", "folder"
KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), FILE),
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": FOLDER,
    b"6": "named pipe",
    b"S": "sparse file",
}
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


class TarError(ValueError):
    """A file is not a tar file, or is damaged; the message says where."""


class NotRegular(OSError):
    """A path is a folder, a named pipe, a socket or a device, not a regular file."""


class Member(NamedTuple):
    """A member of a tar file.

    name: its bytes, which may be invalid UTF-8.
    kind: "file", or another kind in words.
    offset, size: of its data, in bytes.
    """

    name: bytes
    kind: str
    offset: int
    size: int


def shown(name: str | bytes | os.PathLike) -> str:
    """Return a printable form of a name of any bytes, shortened in the middle to 1,001 characters."""
    text = printable(os.fsencode(name).decode("utf-8", "backslashreplace"))
    return text if len(text) <= 1000 else f"{text[:500]}…{text[-500:]}"


def some(names: Sequence[str]) -> str:
    """Return the first of many names, for a message."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


def open_regular(path: str | bytes | os.PathLike) -> int:
    """Open a regular file for reading, and return its descriptor.

    Others are refused: opening a named pipe would wait for its writer, and a device may do anything.

    Raises:
        NotRegular: the path is of another kind.
        OSError: there is no such file, or it cannot be read.
    """
    what = stat.S_IFMT(os.stat(path).st_mode)
    if what == stat.S_IFREG:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may have been replaced since
        if (what := stat.S_IFMT(os.fstat(file).st_mode)) == stat.S_IFREG:
            return file
        os.close(file)
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    raise NotRegular(f"it is {names.get(what, 'a device')}, and must be a regular file")


def members(file: int) -> Iterator[Member]:
    """Iterate over all members of an open tar file: ustar, GNU's or pax.

    Args:
        file: its descriptor.

    Raises:
        TarError: the file is not a tar file, is damaged or truncated, or has data after its end.
    """
    end, at = os.fstat(file).st_size, 0
    long_name, extended = None, {}
    while (block := os.pread(file, BLOCK, at)) != bytes(BLOCK):
        if len(block) < BLOCK:
            raise TarError("it is empty" if end == 0 else f"it is cut short at byte {end:,}")
        if at == 0 and block.startswith(b"\x1f\x8b"):
            raise TarError("it is compressed by gzip, which cannot be read at random: unpack it (gunzip)")
        if not _sums_up(block):
            raise TarError(f"there is no header at byte {at:,}, where one must be: it is damaged or no tar file")
        kind, offset = block[156:157], at + BLOCK
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
            name = prefix + b"/" + name
        name = extended.get(b"path", long_name or name)
        size = _number(block[124:136], name)
        if kind in b"xXgLK":
            if size > MAX_HEADER:
                raise TarError(f"the header at byte {at:,} has {size:,} bytes, and at most {MAX_HEADER:,} are allowed")
            data = os.pread(file, size, offset)
            if kind == b"L":
                long_name = _text(data)
            elif kind in b"xX":
                extended = _records(data, at)
            elif kind == b"g" and not _records(data, at).keys().isdisjoint({b"path", b"size"}):
                raise TarError(f"the header at byte {at:,} gives all files one name or one size")
        else:
            if b"size" in extended:
                size = _decimal(extended[b"size"], name)
            if any(key.startswith(b"GNU.sparse.") for key in extended):
                name, what = extended.get(b"GNU.sparse.name", name), KINDS[b"S"]
            elif kind in b"0\0" and name.endswith(b"/"):  # the oldest archives mark folders so
                what = FOLDER
            else:
                what = KINDS.get(kind, "file of an unknown kind")
            if what == KINDS[b"S"]:  # its end is found only by expanding it
                raise TarError(f"{shown(name)} is a sparse file, and must be a plain one: pack without --sparse")
            if kind in WITHOUT_DATA:
                size = 0
            yield Member(name, what, offset, size)
            long_name, extended = None, {}
        if offset + size > end:
            raise TarError(f"{shown(name)} is cut short: it has {size:,} bytes, of which {end - offset:,} are there")
        at = offset + -(-size // BLOCK) * BLOCK
    _check_end(file, at, end)


def _check_end(file: int, at: int, end: int) -> None:
    """Check that only zeros follow: a zeroed header would hide all files after it."""
    if end - at > MAX_PADDING or os.pread(file, end - at, at).strip(b"\0"):
        raise TarError(
            f"its end is marked at byte {at:,}, but it goes on to byte {end:,}: it is damaged, or several in one"
        )


def _sums_up(header: bytes) -> bool:
    """Return whether a header's checksum is right; some old programs summed signed bytes."""
    try:
        written = int(_text(header[148:156]).strip() or b"0", 8)
    except ValueError:
        return False
    summed = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(summed)
    return written in (unsigned, unsigned - 256 * sum(byte > 127 for byte in summed))


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, name: bytes) -> int:
    """Parse octal digits, or GNU's binary form of larger numbers."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = _text(field).strip() or b"0"
    if not re.fullmatch(rb"[0-7]+", text):
        raise TarError(f"{shown(name)} has the size {text!r}, which must be octal digits")
    return int(text, 8)


def _decimal(text: bytes, name: bytes) -> int:
    if not re.fullmatch(rb"\d{1,20}", text):
        raise TarError(f"{shown(name)} has the size {text[:20]!r}, which must be digits")
    return int(text)


def _records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Parse pax's records, each `length key=value` and a line feed."""
    records, start = {}, 0
    while start < len(data) and data[start]:
        match = re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, start)
        stop = start + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise TarError(f"the extended header at byte {at:,} is damaged")
        records[match[2]] = data[match.end() : stop - 1]
        start = stop
    return records
