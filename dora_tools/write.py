"""The only code that puts weights on disk: spans copied, computed tiles rounded, files synced, then named.

Files are written under temporary names inside the output directory, which derive from the layout's digest, and get
their final names only when every byte of every file is on disk: weights first, the files that make a directory look
complete last. Whatever stops the writing before that leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, Span, TensorInfo, blocks, single_threaded, tiles
from .containers.source import Source
from .dtypes import DTYPES, encode, to_torch, working
from .errors import FitError, ResourceError, UsageError
from .layout import Computed, File, Layout, human, length

if TYPE_CHECKING:
    import torch

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.part")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_COPY_CHUNK = 16 << 20  # one unit of work, progress and early write-back
Progress = Callable[[int], None]
# called with each computed tile: name, rows [first, last), values, the bytes that they were rounded to, their type
Rounded = Callable[[str, int, int, "torch.Tensor", "torch.Tensor", str], None]


@dataclass(frozen=True, slots=True)
class _Copy:
    file: int
    at: int
    span: Span


@dataclass(frozen=True, slots=True)
class _Compute:
    file: int
    at: int
    piece: Computed
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Prepare:
    """Let the checkpoint do what it must do before its rows can be read."""


_Item = _Copy | _Compute | _Prepare


class _Output:
    """One file of the output, under its temporary name until ``publish``."""

    def __init__(self, folder: Path, file: File, digest: str) -> None:
        self.final = folder / file.path
        self.temporary = self.final.with_name(f".{self.final.name}.{digest[:12]}.part")
        self.size = file.size
        self.fd = -1
        self._seek = threading.Lock()
        self._ours = self._published = False

    def open(self) -> None:
        """Create it at its full size, so that a disk that cannot hold it says so now."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.fd = os.open(self.temporary, flags, 0o666)
        if not _locked(self.fd):
            os.close(self.fd)
            self.fd = -1
            raise ResourceError(f"Another merge is writing {self.final} now; wait for it, or write elsewhere.")
        self._ours = True
        if hasattr(os, "posix_fallocate") and self.size:
            try:
                os.posix_fallocate(self.fd, 0, self.size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(self.fd, self.size)

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self.fd, data, offset)
            else:
                with self._seek:  # Windows has no positional write
                    os.lseek(self.fd, offset, os.SEEK_SET)
                    count = os.write(self.fd, data)
            offset, data = offset + count, data[count:]

    def flush_early(self, offset: int, size: int) -> None:
        """Start the disk on what is written, so that the final sync finds little left to do."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        os.fsync(self.fd)
        self.close()

    def publish(self) -> None:
        new = not self.final.exists()
        os.replace(self.temporary, self.final)
        self._published = new

    def discard(self) -> None:
        """Take back what can be: the temporary file, and the final one unless it replaced another."""
        self.close()
        if self._ours:
            with contextlib.suppress(OSError):
                self.temporary.unlink()
        if self._published:
            with contextlib.suppress(OSError):
                self.final.unlink()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write(
    checkpoint: Checkpoint,
    layout: Layout,
    folder: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    check: bool = True,
    closing: Callable[[], Iterable[File]] = tuple,
    rounded: Rounded | None = None,
) -> None:
    """Write ``layout`` with the tensors of ``checkpoint`` into ``folder``, all of it or nothing.

    With ``check``, a number that does not fit its stored type (Inf) is refused: FitError. ``progress`` is called with
    the number of bytes done since the last call. ``closing`` gives further files of literal bytes once the tensors are
    written (a manifest with what was measured), or raises what forbids to keep them; ``rounded`` sees every tile.
    Raises ResourceError for a full or failing disk; whatever the checkpoint raises passes through. Files that already
    stand in ``folder`` under the same names are replaced at the end, each in one step.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    outputs = [_Output(folder, file, layout.digest) for file in layout.files]
    parents = {p for output in outputs for p in output.final.parents}
    made = sorted((p for p in parents if not p.exists()), key=lambda p: len(p.parts), reverse=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        for output in outputs:
            output.open()
        _fill(checkpoint, layout.files, outputs, threads, progress or (lambda count: None), check, rounded)
        for file in closing():
            output = _Output(folder, file, layout.digest)
            outputs.append(output)
            output.open()
            _fill(checkpoint, [file], [output], 1, lambda count: None)
        for _ in blocks(outputs, _Output.sync, threads):
            pass
        for output in outputs:
            output.publish()
        _sync_folders({output.final.parent for output in outputs})
    except BaseException as error:
        for output in outputs:
            output.discard()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise ResourceError(
                f"Writing to {folder} failed: {error.strerror or error}. Nothing was left there."
            ) from error
        raise


def _fill(
    checkpoint: Checkpoint,
    files: Sequence[File],
    outputs: Sequence[_Output],
    threads: int,
    progress: Progress,
    check: bool = True,
    rounded: Rounded | None = None,
) -> None:
    copies: list[_Item] = []
    computes: list[_Item] = []
    for index, file in enumerate(files):
        at = 0
        for piece in file.pieces:
            if isinstance(piece, bytes):
                outputs[index].write(at, memoryview(piece))
                progress(len(piece))
            elif isinstance(piece, Span):
                for offset in range(0, piece.length, _COPY_CHUNK):
                    size = min(_COPY_CHUNK, piece.length - offset)
                    copies.append(_Copy(index, at + offset, Span(piece.path, piece.offset + offset, size)))
            else:
                info = checkpoint.tensors[piece.name]
                computes += (_Compute(index, at, piece, first, last) for first, last in tiles(info))
            at += length(piece)
    worker = _Worker(checkpoint, outputs, threads, check, rounded)
    # torch is imported, and column norms are taken, by one worker while the others copy
    for items in ([_Prepare(), *copies] if computes else copies, computes):
        for _, count in blocks(items, worker, threads):
            progress(count)


def _locked(fd: int) -> bool:
    """Lock a file for this process; False where another has it. Where files cannot be locked, nobody has."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of merges that were killed: those of running ones are locked."""
    for path in folder.rglob(".*.part") if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb+") as file:
                if _locked(file.fileno()):
                    path.unlink()


class _Worker:
    """Does one piece of work in whatever thread it is called; buffers and open sources are its own."""

    def __init__(
        self, checkpoint: Checkpoint, outputs: Sequence[_Output], threads: int, check: bool, rounded: Rounded | None
    ) -> None:
        self._check, self._rounded = check, rounded
        self._checkpoint, self._outputs, self._threads = checkpoint, outputs, threads
        self._sources: dict[Path, Source] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._can_copy = hasattr(os, "copy_file_range")

    def __call__(self, item: _Item) -> int:
        match item:
            case _Copy():
                return self._copy(item)
            case _Compute():
                return self._compute(item)
            case _Prepare():
                prepare = getattr(self._checkpoint, "prepare", None)
                if prepare is not None:
                    prepare(self._threads)
                return 0

    def _copy(self, item: _Copy) -> int:
        output, span = self._outputs[item.file], item.span
        with self._lock:
            source = self._sources.get(span.path) or self._sources.setdefault(span.path, Source(span.path))
        done = 0
        while self._can_copy and done < span.length:
            try:
                count = os.copy_file_range(
                    source.fileno(), output.fd, span.length - done, span.offset + done, item.at + done
                )
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    raise
                self._can_copy = False  # other file system or old kernel: through memory, from here on
                break
            if count == 0:
                break
            done += count
        if done < span.length:
            buffer = bytearray(min(1 << 20, span.length - done))
            while done < span.length:
                view = memoryview(buffer)[: span.length - done]
                source.readinto(span.offset + done, view)
                output.write(item.at + done, view)
                done += len(view)
        output.flush_early(item.at, span.length)
        return span.length

    def _compute(self, item: _Compute) -> int:
        single_threaded()
        import torch

        name, dtype = item.piece.name, item.piece.dtype
        info = self._checkpoint.tensors[name]
        count = (item.last - item.first) * info.width
        kept: dict[torch.dtype, torch.Tensor] = self._local.__dict__.setdefault("kept", {})
        buffer = kept.get(working(info.dtype))
        if buffer is not None and buffer.numel() >= count:
            out = buffer[:count].view(-1, info.width)
            values = self._checkpoint.read(name, item.first, item.last, out)
        else:
            values = self._checkpoint.read(name, item.first, item.last)
            # a buffer of our own for the next time: what was read may be somebody's tensor
            kept[working(info.dtype)] = torch.empty(count, dtype=working(info.dtype), device=values.device)
        target = TensorInfo(dtype, info.shape, width=info.width)
        size, at = target.bytes_of(count), item.at + target.bytes_of(item.first * info.width)
        raw = getattr(self._local, "raw", None)
        if raw is None or raw.numel() < size:
            raw = self._local.raw = torch.empty(size, dtype=torch.uint8)
        encode(values, dtype, raw[:size])
        if self._rounded is not None:
            self._rounded(name, item.first, item.last, values, raw[:size], dtype)
        if self._check and DTYPES[dtype].quantised and not float(values.abs().max()) <= 65504:  # NaN is not, either
            raise FitError(f"{name} holds NaN, Inf or values beyond the range of {dtype} (65504). Use --gguf-type f32.")
        narrower = DTYPES[info.dtype].nbytes > DTYPES[dtype].nbytes and DTYPES[dtype].torch
        if self._check and (dtype == "F16" or narrower):
            written = raw[:size].view(to_torch(dtype))
            if not bool(written.isfinite().all()) and bool(values.isfinite().all()):
                raise FitError(
                    f"{name} holds values beyond the range of {dtype}{' (65504)' * (dtype == 'F16')}. "
                    "Use a wider type: --dtype bfloat16 or float32, of a GGUF --gguf-type bf16 or f32."
                )
        output = self._outputs[item.file]
        output.write(at, raw[:size].numpy().data)
        output.flush_early(at, size)
        return size


def _sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # Windows cannot open a directory
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def check_room(layout: Layout, folder: Path) -> int:
    """Free bytes where ``folder`` will lie. Raises ResourceError when the layout does not fit."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if layout.size > free:
        raise ResourceError(
            f"{folder} needs {human(layout.size)}, but {place} has {human(free)} free. Write to another disk."
        )
    return free


def check_file(path: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuse to write over an input, or over any other file without ``force``. Raises UsageError."""
    if not path.exists():
        return
    if path.is_dir():
        raise UsageError(f"{path} is a directory; the output is a file.")
    for source in inputs:
        if any(path.samefile(p) for p in ([source, *source.iterdir()] if source.is_dir() else [source])):
            raise UsageError(f"{path} is an input. Choose another name.")
    if not force:
        raise UsageError(f"{path} exists; --force replaces it. Choose another name.")


def check_target(layout: Layout, folder: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuse to write over an input, or over anything else without ``force``. Raises UsageError."""
    for source in inputs:
        home = source if source.is_dir() else source.parent
        for file in layout.files:
            if (folder / file.path).exists() and any(
                (folder / file.path).samefile(p) for p in (source, home / file.path) if p.exists()
            ):
                raise UsageError(f"{folder / file.path} is part of the input {source}; write somewhere else.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; the output is a directory.")
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    present = [name for name in present if not _LEFTOVER.fullmatch(name)]
    if force:
        stale = [p.name for pattern in _WEIGHTS for p in sorted(folder.glob(pattern))]
        stale = [name for name in stale if name not in {file.path for file in layout.files}]
        if stale:
            raise UsageError(
                f"{folder} holds other weights ({', '.join(stale[:3])}{', …' if len(stale) > 3 else ''}), which might "
                "be loaded instead of what would be written. Remove them or choose another directory."
            )
    else:
        if present:
            raise UsageError(
                f"{folder} is not empty ({', '.join(present[:3])}{', …' if len(present) > 3 else ''}). Choose another "
                "directory, or let --force replace the files of the same names."
            )
