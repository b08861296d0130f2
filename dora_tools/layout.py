"""Which bytes go where in which file: known in full before the first one moves.

A ``File`` is its pieces in order: literal bytes, a span of an existing file, or a tensor that is computed (or rounded)
while it is written. Containers lay weights out; companions are literal bytes; ``write`` puts either on disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from .checkpoint import Span
from .errors import UsageError


@dataclass(frozen=True, slots=True)
class Computed:
    """One tensor of the checkpoint being written, rounded to ``dtype``."""

    name: str
    dtype: str
    length: int


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def bytes_of(size: str | int) -> int:
    """Bytes that a user means by ``5GB``, ``800MB``, ``2GiB``, or a number. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or not 1 <= float(match[1]) * _UNITS[match[2]] < 2**62:
        raise UsageError(f"'{size}' is not a size; write 5GB, 800MB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def human(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


Piece = bytes | Span | Computed


def length(piece: Piece) -> int:
    """Bytes that a piece takes in its file."""
    return len(piece) if isinstance(piece, bytes) else piece.length


@dataclass(frozen=True)
class File:
    """One file of the output: its path relative to the output directory, and what stands in it, in order."""

    path: str
    pieces: tuple[Piece, ...]

    @cached_property
    def size(self) -> int:
        return sum(length(piece) for piece in self.pieces)


@dataclass(frozen=True)
class Layout:
    """All files of an output, in the order in which they get their final names: weights, companions, index."""

    files: tuple[File, ...]
    digest: str = field(init=False)

    def __init__(self, files: Iterable[File]) -> None:
        object.__setattr__(self, "files", tuple(files))
        state = hashlib.sha256()
        for file in self.files:
            state.update(repr((file.path, file.pieces)).encode())
        object.__setattr__(self, "digest", state.hexdigest())

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)
