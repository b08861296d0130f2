"""A file read at offsets, the one way in which containers touch bytes; and tensors that lie in files as they are."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Span, TensorInfo
from ..dtypes import decode
from ..errors import InputError

if TYPE_CHECKING:
    import torch


class Source:
    """A file opened once, read at any offset from any thread; it stays open as long as somebody holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{path} is not an ordinary file.")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - lives as long as this object
            weakref.finalize(self, self._file.close)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
        self._seek = threading.Lock()

    def fileno(self) -> int:
        return self._file.fileno()

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``. Raises InputError where the file ends before."""
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``. Raises InputError where the file ends before or reading fails."""
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(offset + done, buffer[done:])
                if count == 0:
                    raise InputError(
                        f"{self.path} ends at byte {self.size}, but {len(buffer)} bytes are needed at {offset}: "
                        "the file was cut off. Download or copy it again."
                    )
                done += count
        except OSError as error:
            raise InputError(f"{self.path} cannot be read at byte {offset + done}: {error.strerror}.") from error

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._seek:  # Windows has no positional read
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0


class Stored:
    """A Checkpoint of tensors each of which lies in one piece of one file, in its final bytes."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: Mapping[str, Any] = {}
        self._sources: dict[str, Source] = {}
        self._offsets: dict[str, int] = {}
        self._scratch = threading.local()

    def add(self, source: Source, tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int]) -> None:
        """The tensors of one file, and where in it the data of each begin."""
        self._sources[source.path.name] = source
        self.tensors.update(tensors)
        self._offsets.update(offsets)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """See Checkpoint. Raises InputError where the file cannot be read or its type cannot be decoded."""
        import torch

        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        count = info.bytes_of((stop - start) * info.width)
        raw: torch.Tensor | None = getattr(self._scratch, "raw", None)
        if raw is None or raw.numel() < count or out is None:
            raw = torch.empty(count, dtype=torch.uint8)
            if out is not None:
                self._scratch.raw = raw
        offset = self._offsets[name] + info.bytes_of(start * info.width)
        self._sources[info.file].readinto(offset, raw[:count].numpy().data)
        return decode(raw[:count], info.dtype, out).view(stop - start, info.width)

    def span(self, name: str) -> Span | None:
        """See Checkpoint."""
        info = self.tensors[name]
        return Span(self._sources[info.file].path, self._offsets[name], info.nbytes)
