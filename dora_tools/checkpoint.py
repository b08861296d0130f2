"""Named tensors that can be read a few rows at a time: files, dictionaries, and views over them.

A *row* is ``width`` consecutive stored elements: the last dimension of a matrix, one element of a vector, or what a
view says (a conv weight seen as a matrix). Everything below speaks of rows, so a tensor of any size costs its reader
one block. ``tiles`` cuts a tensor by its shape alone; all arithmetic runs tile by tile, which is what makes results
independent of threads and read sizes.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from math import frexp, prod
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from .dtypes import DTYPES, of_torch, working
from .errors import InputError

if TYPE_CHECKING:
    import torch

TILE_ELEMENTS = 1 << 19  # 1 MB of bf16, 2 MB as float32: measured optimum, the scratch stays in a core's cache
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it: stored type, shape, row width, and the file it belongs to."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    width: int = 0

    def __post_init__(self) -> None:
        if not self.width:
            object.__setattr__(self, "width", self.shape[-1] if len(self.shape) > 1 else 1)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> int:
        return self.numel // self.width if self.width else 0

    @property
    def nbytes(self) -> int:
        return self.bytes_of(self.numel)

    def bytes_of(self, elements: int) -> int:
        """Bytes that this many consecutive elements take."""
        kind = DTYPES[self.dtype]
        return elements * kind.nbytes // kind.block


@dataclass(frozen=True, slots=True)
class Span:
    """Where final bytes already lie."""

    path: Path
    offset: int
    length: int


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors, read by row ranges; thread-safe."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In stored order; known without torch."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """``config``: config.json; ``headers``: what a container needs to write the same file again; …"""

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) as a (rows, width) tensor: float32, decoded exactly (integers and float64 as they are)."""

    def span(self, name: str) -> Span | None:
        """Where the tensor's final bytes lie in a file; None when they are computed."""


def tiles(info: TensorInfo) -> list[tuple[int, int]]:
    """Row ranges that cover a tensor, by its shape alone. A short tail joins its neighbour."""
    rows, step = info.rows, max(1, TILE_ELEMENTS // max(1, info.width))
    starts = list(range(0, rows, step))
    if len(starts) > 1 and rows - starts[-1] < step // 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True)) if rows else []


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor promised: its shape and stored type are known, its values come with ``load()`` as float32.

    Transposing, reshaping or slicing a promise gives another promise. ``key`` is where it was read from; ``origin``
    is there while the promise is a stored tensor as it stands, whose rows can be read one by one.
    """

    shape: tuple[int, ...]
    dtype: str
    fetch: Callable[[], torch.Tensor]
    key: str = ""
    origin: Checkpoint | None = None
    scale: float = 1.0

    def load(self) -> torch.Tensor:
        values = self.fetch()
        return values if self.scale == 1.0 else values * self.scale

    @property
    def kept(self) -> str:
        """The stored type that holds the values without rounding: as read, or F32 for a multiple of half precision."""
        whole = self.scale == 1.0 or self.dtype in ("F32", "F64")
        # a power of two moves the exponent only, for which BF16 has as much room as F32
        shifted = self.dtype == "BF16" and abs(frexp(self.scale)[0]) == 0.5 and 2**-40 < abs(self.scale) < 2**40
        return self.dtype if (whole or shifted) and not DTYPES[self.dtype].quantised else "F32"

    @property
    def T(self) -> Ref:
        fetch = self.fetch
        return replace(self, shape=self.shape[::-1], fetch=lambda: fetch().T, origin=None)

    def reshape(self, *shape: int) -> Ref:
        fetch, numel = self.fetch, prod(self.shape)
        if -1 in shape:
            known = -prod(shape)
            shape = tuple(numel // known if n == -1 and known else n for n in shape)
        return replace(self, shape=shape, fetch=lambda: fetch().reshape(shape), origin=None)

    def rows(self, which: slice | Sequence[int]) -> Ref:
        """Some of the rows, or all in another order."""
        fetch = self.fetch
        count = len(range(*which.indices(self.shape[0]))) if isinstance(which, slice) else len(which)
        chosen = which if isinstance(which, slice) else list(which)
        return replace(self, shape=(count, *self.shape[1:]), fetch=lambda: fetch()[chosen], origin=None)

    def times(self, factor: float) -> Ref:
        return replace(self, scale=self.scale * factor)

    def over(self, divisor: float) -> Ref:
        """Undoes ``times`` to the last bit."""
        return replace(self, scale=self.scale / divisor)


def ref(checkpoint: Checkpoint, name: str) -> Ref:
    """A promise of one whole tensor of a checkpoint."""
    info = checkpoint.tensors[name]
    return Ref(info.shape, info.dtype, lambda: checkpoint.read(name).reshape(info.shape), name, checkpoint)


def constant(tensor: torch.Tensor, key: str = "") -> Ref:
    """A promise of a tensor that is already there."""
    dtype = of_torch(tensor.dtype)
    return Ref(tuple(tensor.shape), dtype, lambda: tensor.to(working(dtype)), key)


def equal(a: Ref, b: Ref) -> bool:
    """Whether two promised tensors have the same shape and values; loads both, if they are not one."""
    return a is b or (a.shape == b.shape and bool((a.load() == b.load()).all()))


def same(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    """Whether two stored tensors have the same shape and values, read tile by tile."""
    if a.tensors[name].shape != b.tensors[other].shape:
        return False
    return all(bool((a.read(name, *rows) == b.read(other, *rows)).all()) for rows in tiles(a.tensors[name]))


def assembled(shape: tuple[int, int], pieces: Sequence[tuple[Ref, int, int]]) -> Ref:
    """A promise of a matrix of zeros with smaller matrices put in, each at its row and column."""

    def fetch() -> torch.Tensor:
        values = [(promise.load(), row, column) for promise, row, column in pieces]
        whole = values[0][0].new_zeros(shape)
        for part, row, column in values:
            whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        return whole

    return Ref(shape, pieces[0][0].dtype, fetch, pieces[0][0].key)


def computed(shape: tuple[int, ...], make: Callable[..., torch.Tensor], *parts: Ref) -> Ref:
    """A promise of what ``make`` makes of the values of other promises."""
    return Ref(shape, "F32", lambda: make(*(part.load() for part in parts)), parts[0].key)


_remembered: OrderedDict[int, torch.Tensor] = OrderedDict()
_remembering = threading.Lock()
_numbers = count()


def remembered(promise: Ref) -> Ref:
    """The same promise, for a tensor that is asked for part by part: the last few of these stay loaded."""
    number = next(_numbers)

    def fetch() -> torch.Tensor:
        with _remembering:
            if number not in _remembered:
                _remembered[number] = promise.fetch()
                while len(_remembered) > 6:
                    _remembered.popitem(last=False)
            _remembered.move_to_end(number)
            return _remembered[number]

    return replace(promise, fetch=fetch, origin=None)


@dataclass(frozen=True)
class Tensors:
    """A dictionary of promised tensors as a checkpoint: ``file`` is the name they would be written under."""

    refs: Mapping[str, Ref]
    file: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(promise.kept, promise.shape, self.file) for name, promise in self.refs.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        promise = self.refs[name]
        if promise.origin is not None and promise.scale == 1.0:
            return promise.origin.read(promise.key, start, stop, out)
        rows = promise.load().reshape(-1, self.tensors[name].width)[start:stop]
        return rows if out is None else out.copy_(rows)

    def span(self, name: str) -> Span | None:
        return None


@dataclass(frozen=True)
class View:
    """Another checkpoint under other names: each new tensor is one old one, possibly with rows of another width.

    ``sources`` maps every name of the view to (checkpoint, old name); bytes are unchanged, so spans are kept.
    """

    sources: Mapping[str, tuple[Checkpoint, str]]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        source, old = self.sources[name]
        new_width, old_width = self.tensors[name].width, source.tensors[old].width
        if new_width == old_width:
            return source.read(old, start, stop, out)
        stop = self.tensors[name].rows if stop is None else stop
        first, last = start * (new_width // old_width), stop * (new_width // old_width)
        if out is not None:
            source.read(old, first, last, out.view(-1, old_width))
            return out
        return source.read(old, first, last).reshape(-1, new_width)

    def span(self, name: str) -> Span | None:
        source, old = self.sources[name]
        return source.span(old)


class Deferred:
    """A checkpoint whose maker is called on the first read: what it holds is known, and planned with, before that.

    ``computed`` names the tensors that ``make`` will change; the others keep the span that they have in ``base``.
    ``ready`` is what was made, once it is.
    """

    def __init__(self, base: Checkpoint, computed: Container[str], make: Callable[[], Checkpoint]) -> None:
        self._base, self._computed, self._make = base, computed, make
        self.tensors, self.metadata = base.tensors, base.metadata
        self.ready: Checkpoint | None = None
        self._lock = threading.Lock()

    @property
    def made(self) -> Checkpoint:
        if self.ready is None:
            with self._lock:
                self.ready = self.ready or self._make()
        return self.ready

    def prepare(self, threads: int) -> None:
        prepare = getattr(self.made, "prepare", None)
        if prepare is not None:
            prepare(threads)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.made.read(name, start, stop, out)

    def span(self, name: str) -> Span | None:
        return None if name in self._computed else self._base.span(name)


def plain(checkpoint: Checkpoint, where: str) -> Checkpoint:
    """``checkpoint``, if nothing in it is ``opaque``: not a plain tensor, which no reader here could carry on."""
    opaque: Mapping[str, str] = checkpoint.metadata.get("opaque") or {}
    for name, what in opaque.items():
        raise InputError(
            f"{where}: {len(opaque)} entries are not plain tensors (first: {name}, {what}); quantised or distributed "
            "tensors must be saved as dense ones first."
        )
    return checkpoint


def arranged(
    base: Checkpoint, aliases: Mapping[str, str] | None = None, widths: Mapping[str, int] | None = None
) -> Checkpoint:
    """``base`` with further names for some of its tensors, and with rows of another width in others.

    ``aliases``: new name → old name (an untied head). ``widths``: name → elements in a row, a multiple of what it was
    (a conv weight as a matrix).
    """
    tensors = dict(base.tensors)
    sources: dict[str, tuple[Checkpoint, str]] = {name: (base, name) for name in tensors}
    for new, old in (aliases or {}).items():
        tensors[new], sources[new] = base.tensors[old], (base, old)
    for name, width in (widths or {}).items():
        tensors[name] = replace(tensors[name], width=width)
    return View(sources, tensors, base.metadata)


def overlay(base: Checkpoint, over: Checkpoint) -> Checkpoint:
    """``base`` with the tensors of ``over`` put over it, in the files and stored types that ``base`` has for them."""
    tensors = dict(base.tensors)
    sources: dict[str, tuple[Checkpoint, str]] = {name: (base, name) for name in tensors}
    for name, info in over.tensors.items():
        sources[name] = (over, name)
        if name in tensors:
            old = tensors[name]
            info = TensorInfo(old.dtype, info.shape, old.file)
        tensors[name] = info
    return View(sources, tensors, base.metadata)


def blocks(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[tuple[T, R]]:
    """Run ``work`` on every item in worker threads; yield (item, result) as they finish, in no order.

    The only place where dora-tools starts threads. The first exception stops all workers and is raised here.
    """
    queue: SimpleQueue[tuple[T, R] | BaseException | None] = SimpleQueue()
    source, lock, stop = iter(items), threading.Lock(), threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                queue.put((item, work(item)))
        except BaseException as error:
            stop.set()
            queue.put(error)
        queue.put(None)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(max(1, threads))]
    running = len(workers)
    try:  # from here on an interrupt finds every thread that was started, and waits for it
        for worker in workers:
            worker.start()
        while running:
            done = queue.get()
            if done is None:
                running -= 1
            elif isinstance(done, BaseException):
                raise done
            else:
                yield done
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        torch_module = sys.modules.get("torch")
        if torch_module is not None:  # a worker's one-thread setting is also the default of threads to come: undo that
            torch_module.set_num_threads(torch_module.get_num_threads())


_thread = threading.local()


def single_threaded() -> None:
    """In a worker: torch's own threads off for this thread, since tiles are small and the workers are the threads."""
    if not getattr(_thread, "single", False):
        import torch

        torch.set_num_threads(1)
        _thread.single = True
