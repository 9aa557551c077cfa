"""Tar files of images for tests, sound and damaged."""

import io
import tarfile

import numpy as np
from PIL import Image


def add(tar, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def png(value, format="png"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, format)
    return buffer.getvalue()


def packed(path, *members):
    """Write a shard of (name, content) or (name, content, fields of the header)."""
    with tarfile.open(path, "w") as tar:
        for name, content, *fields in members:
            add(tar, name, content, **(fields[0] if fields else {}))
    return path


def header(kind, name, size=b"", **fields):
    """Return a tar header with a correct checksum; fields are {offset: bytes}."""
    block = bytearray(512)
    places = {"0": name, "124": size, "156": kind, "257": b"ustar\x0000", "148": b" " * 8} | fields
    for offset, value in places.items():
        block[int(offset) : int(offset) + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size):
    return b"\x80" + size.to_bytes(11, "big")


def shard(path, values, numbered=True):
    """Image v has the value v and the class v % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for value in values:
            if numbered:
                add(tar, f"{value:04}.png", png(value))
                add(tar, f"{value:04}.cls", str(value % 3).encode())
            else:
                add(tar, f"set/class{value % 3}/{value:04}.png", png(value))
    return path


def pairs(suffix, contents):
    """Image number i, with a file of that suffix."""
    return [member for i, c in enumerate(contents) for member in ((f"{i}.png", png(i)), (f"{i}.{suffix}", c))]
