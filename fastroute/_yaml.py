"""Bounded reading of untrusted YAML: a short file could otherwise exhaust memory or never finish."""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from fastroute._errors import in_a_line

BYTES = 2**18
NODES = 10_000
DEPTH = 16


def read(path: Path) -> Any:
    """Read a YAML file with `load`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, is larger than `BYTES`, or `load` raises. The message does not name the
            file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK: do not wait for the writer of a pipe
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file; it must be a YAML file")
        content = file.read(BYTES + 1)
    if len(content) > BYTES:
        raise ValueError(f"it is larger than {BYTES:,} bytes, the most that a YAML file of options may have")
    try:
        return load(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not a YAML file: it is not UTF-8 at byte {error.start}") from None


def load(text: str) -> Any:
    """Parse YAML text into plain values, lists and mappings.

    Raises:
        ValueError: it is not YAML; it has anchors or aliases, which can expand to far more than is written; it repeats
            a key; or it has more than `DEPTH` levels or `NODES` values.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"it is not a YAML file of options: {place}{error.problem or error.context}") from None
    except Exception as error:  # any error of a constructor on malformed numbers or dates
        raise ValueError(f"it is not a YAML file of options: {in_a_line(error)}") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, stream):
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refusal("anchors and aliases are not supported: write the value out", event)
        self._nodes += 1
        self._depth += 1
        if self._depth > DEPTH:
            raise _refusal(f"there are more than {DEPTH} levels", event)
        if self._nodes > NODES:
            raise _refusal(f"there are more than {NODES:,} values", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise _refusal(f"{key.value!r} is given twice: keep one", key)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, at: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
