"""A file read at offsets: the one way in which containers touch bytes."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from pathlib import Path

from ..errors import InputError


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
