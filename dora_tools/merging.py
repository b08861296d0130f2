"""A merged model: a checkpoint whose changed tensors are computed when their rows are read.

It reads as float32 and is never rounded here. All arithmetic runs in the tiles of ``checkpoint.tiles``, so a row has
the same bits whoever asks for it, in whatever portions, on any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from math import sqrt
from typing import Any, TypeVar

import torch

from .adapter import Axis, Kernel, Magnitude, Unchanged, loaded
from .binding import Binding, Bound
from .checkpoint import Checkpoint, Span, TensorInfo, blocks, single_threaded, tiles
from .dtypes import encode, to_torch, working
from .errors import FitError, InputError, ResourceError
from .lowrank import column_squares, factors, row_norms

_KEPT = 8  # tensors whose kernels stay loaded: those in work on the threads, and a few to come
_HELD = 1 << 26  # numbers in them, beyond which only two do


@dataclass(frozen=True, slots=True)
class _Part:
    """One bound update, loaded."""

    kernel: Kernel
    vector: torch.Tensor | None  # the magnitude's
    magnitude: Magnitude | None
    follows: tuple[str, int] | None
    strength: float
    first: int  # of the stored rows, [first, last), that it is of
    last: int

    @property
    def axis(self) -> Axis | None:
        return self.magnitude.axis if self.magnitude is not None else None

    @property
    def linear(self) -> bool:
        """Only adds something, so that its kernel has the strength in it already."""
        return self.magnitude is None and self.follows is None

    def factors(self, norms: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, int]:
        """m / n for the norms of rows or columns, its own from ``first`` on; and how many have no direction."""
        assert self.vector is not None
        assert self.magnitude is not None
        m = self.vector[first : first + norms.shape[0]]
        return factors(m, norms, self.magnitude.eps, self.magnitude.eps_rule)


@dataclass(frozen=True, slots=True)
class Change:
    """How much a tensor changed: Frobenius norms of W' − W and W, and rows or columns without direction."""

    delta: float
    weight: float
    zeros: int

    @property
    def relative(self) -> float:
        return self.delta / self.weight if self.weight else float("inf") if self.delta else 0.0


class Merged:
    """base + bound adapters as a Checkpoint (see ``Checkpoint``), on any device; ``stats`` also measures the change.

    Raises InputError for NaN or Inf in the adapter and FitError for one in a result, unless ``allow_nonfinite``;
    ResourceError for a device that is not there.
    """

    def __init__(
        self, binding: Binding, device: str = "cpu", stats: bool = False, allow_nonfinite: bool = False
    ) -> None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ResourceError(f"Device '{device}' cannot be used: {str(error).splitlines()[0]}.") from error
        self._binding, self._base, self._device = binding, binding.base, device
        self._stats, self._check = stats, not allow_nonfinite
        self._sums: dict[str, dict[int, tuple[float, float, int]]] = {name: {} for name in binding.bound}
        self._ratios: dict[tuple[str, int], torch.Tensor] = {}
        self._column_zeros: dict[str, int] = {}
        self._parts: OrderedDict[str, tuple[_Part, ...]] = OrderedDict()
        self._lock, self._loading, self._norming = threading.Lock(), threading.Lock(), threading.Lock()
        if device.startswith("cuda"):
            torch.backends.cuda.matmul.allow_tf32 = False

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._base.tensors

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._base.metadata

    @property
    def merged(self) -> Mapping[str, tuple[Bound, ...]]:
        """The tensors that change, with the updates on each."""
        return self._binding.bound

    def span(self, name: str) -> Span | None:
        return None if name in self._binding.bound else self._base.span(name)

    def prepare(self, threads: int = 1) -> None:
        """What must be known before rows are, in one parallel pass: column norms, and factors that biases follow."""
        bounds = [(name, i, b) for name, bounds in self._binding.bound.items() for i, b in enumerate(bounds)]
        columns = [(name, i) for name, i, b in bounds if b.magnitude is not None and b.magnitude.axis == "in"]
        self._take_norms([*columns, *(b.follows for _, _, b in bounds if b.follows is not None)], threads)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self._binding.bound:
            values = self._base.read(name, start, stop, out)
            if self._check and name in self._binding.saved and not bool(values.isfinite().all()):
                raise InputError(
                    f"{name}, which the adapter saved whole, holds NaN or Inf: the training diverged or the file is "
                    "damaged. Use an earlier checkpoint; --allow-nonfinite merges it all the same."
                )
            return values
        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        dtype = working(info.dtype)
        result = torch.empty(stop - start, info.width, dtype=dtype, device=self._device) if out is None else out
        for first, last in tiles(info):
            if first >= start and last <= stop:
                self._tile(name, first, last, result[first - start : last - start])
            elif first < stop and last > start:
                whole = torch.empty(last - first, info.width, dtype=dtype, device=self._device)
                self._tile(name, first, last, whole)
                a, b = max(first, start), min(last, stop)
                result[a - start : b - start] = whole[a - first : b - first]
        return result

    def change(self, name: str) -> Change:
        """What ``stats`` measured of a tensor whose rows have all been read."""
        sums = [self._sums[name][first] for first in sorted(self._sums[name])]
        return Change(sqrt(sum(s[0] for s in sums)), sqrt(sum(s[1] for s in sums)), self.zeros(name))

    def zeros(self, name: str) -> int:
        """Rows (axis out) or columns (axis in) of a DoRA'd tensor that have no direction and stayed V."""
        return sum(s[2] for s in self._sums[name].values()) + self._column_zeros.get(name, 0)

    def _tile(self, name: str, first: int, last: int, w: torch.Tensor) -> None:
        """The merged rows [first, last) into ``w``; the bounds are those of a tile."""
        parts = self._loaded(name, w.dtype)
        ratios = [self._factors_beforehand(name, i, part) for i, part in enumerate(parts)]
        self._base.read(name, first, last, w)
        pristine = w.clone() if self._stats else None
        # rows that the same updates are of; most tensors have one update, of all rows
        cuts = sorted({first, last, *(min(max(at, first), last) for p in parts for at in (p.first, p.last))})
        zeros, finite = 0, True
        for a, b in pairwise(cuts):
            here = [(p, r) for p, r in zip(parts, ratios, strict=True) if p.first <= a and b <= p.last]
            count, known = self._rows(here, w[a - first : b - first], a)
            zeros, finite = zeros + count, finite and known
        if self._check and not finite and not bool(w.isfinite().all()):
            raise FitError(
                f"{name}: the merged rows {first} to {last} hold NaN or Inf. Does the base hold some? "
                "--allow-nonfinite writes them all the same."
            )
        delta = weight = 0.0
        if self._stats and pristine is not None:
            weight = float(pristine.double().square_().sum())
            delta = float(pristine.sub_(w).double().square_().sum())
        self._sums[name][first] = (delta, weight, zeros)

    def _rows(
        self, parts: Sequence[tuple[_Part, torch.Tensor | None]], w: torch.Tensor, first: int
    ) -> tuple[int, bool]:
        """The stored rows from ``first`` on, all of which ``parts`` are of; returns as ``_merge`` does."""
        if not parts:
            return 0, False
        if len(parts) == 1 and (parts[0][0].strength == 1.0 or parts[0][0].linear):
            return self._merge(*parts[0], w, first)
        pristine, total, zeros = w.clone(), w.clone(), 0
        for part, ratio in parts:
            w.copy_(pristine)
            zeros += self._merge(part, ratio, w, first)[0]
            w.sub_(pristine)
            if not part.linear:
                w.mul_(part.strength)
            total.add_(w)
        w.copy_(total)
        return zeros, False

    @staticmethod
    def _merge(part: _Part, ratio: torch.Tensor | None, w: torch.Tensor, first: int) -> tuple[int, bool]:
        """W becomes W', in place; returns how many rows had no direction, and whether W' is known to be finite."""
        part.kernel.apply(w, first - part.first)
        if part.axis == "out":
            norms = row_norms(w)
            ratio, zeros = part.factors(norms, first - part.first)
            w.mul_(ratio.unsqueeze(1))
            return zeros, bool(norms.sum().isfinite())  # |w'| ≤ |m|, which is finite
        if ratio is not None:
            w.mul_(ratio if part.axis == "in" else ratio[first - part.first :][: len(w)].unsqueeze(1))
            if part.axis == "in":
                return 0, bool(ratio.isfinite().all())  # as above: a column with NaN or Inf has no finite norm
        return 0, bool(w.sum().isfinite())

    def _factors_beforehand(self, name: str, index: int, part: _Part) -> torch.Tensor | None:
        """m / n where it is not a matter of these rows alone: of every column; or, for a bias, those of its weight."""
        if part.follows is not None:
            return self._ratio(*part.follows)
        return self._ratio(name, index) if part.axis == "in" else None

    def _loaded(self, name: str, dtype: torch.dtype) -> tuple[_Part, ...]:
        with self._lock:
            if name in self._parts:
                self._parts.move_to_end(name)
                return self._parts[name]
        with self._loading:
            with self._lock:
                if name in self._parts:
                    return self._parts[name]
            parts = []
            for bound in self._binding.bound[name]:
                m = bound.magnitude
                linear = m is None and bound.follows is None
                kernel = bound.delta.kernel(bound.strength if linear else 1.0, self._device, dtype, self._check)
                vector = loaded(m.vector, self._device, dtype, self._check) if m is not None else None
                first, last = bound.part or (0, self.tensors[name].rows)
                parts.append(_Part(kernel, vector, m, bound.follows, bound.strength, first, last))
            with self._lock:
                self._parts[name] = tuple(parts)
                while len(self._parts) > _KEPT or (len(self._parts) > 2 and self._held() > _HELD):
                    self._parts.popitem(last=False)
            return tuple(parts)

    def _held(self) -> int:
        return sum(bound.delta.held for name in self._parts for bound in self._binding.bound[name])

    def _ratio(self, name: str, index: int) -> torch.Tensor:
        with self._norming:
            if (name, index) not in self._ratios:
                self._take_norms([(name, index)], 1)
            return self._ratios[name, index]

    def _take_norms(self, wanted: Sequence[tuple[str, int]], threads: int) -> None:
        """m / n of the ``wanted`` updates: for each column, or for each row."""

        def part(at: tuple[str, int]) -> _Part:
            return self._loaded(at[0], working(self.tensors[at[0]].dtype))[at[1]]

        def kernel(at: tuple[str, int]) -> Callable[[], Kernel]:
            return lambda: part(at).kernel

        todo = {
            at: Normed(at[0], part(at).axis or "out", kernel(at), self._binding.bound[at[0]][at[1]].part)
            for at in wanted
        }
        for at, found in norms(self._base, todo, threads, self._device):
            self._ratios[at], zeros = part(at).factors(found)
            if todo[at].axis == "in":
                self._column_zeros[at[0]] = self._column_zeros.get(at[0], 0) + zeros


@dataclass(frozen=True, slots=True)
class Normed:
    """What ``norms`` takes the norms of: the rows ("out") or columns ("in") of a stored tensor after a kernel."""

    name: str
    axis: Axis
    kernel: Callable[[], Kernel]
    part: tuple[int, int] | None = None  # only these rows, which the kernel counts from 0

    def tiles(self, info: TensorInfo) -> list[tuple[int, int]]:
        """The tiles of the tensor, as far as they are of its part."""
        first, last = self.part or (0, info.rows)
        return [(max(a, first), min(b, last)) for a, b in tiles(info) if a < last and b > first]


K = TypeVar("K")


def norms(
    base: Checkpoint,
    wanted: Mapping[K, Normed],
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[K, torch.Tensor]]:
    """‖V‖ of rows or columns, in one parallel pass over the tensors; yields (key, norms) as they are complete.

    Column sums are float64, added in row order, so that the result does not depend on the threads. ``progress`` is
    called with bytes read.
    """
    local = threading.local()

    def scratch(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        pair = getattr(local, "pair", None)
        if pair is None or pair[0].numel() < rows * width or pair[0].dtype != dtype:
            pair = tuple(torch.empty(rows * width, dtype=dtype, device=device) for _ in range(2))
            local.pair = pair
        return pair[0][: rows * width].view(rows, width), pair[1][: rows * width].view(rows, width)

    def squares(item: tuple[K, tuple[int, int]]) -> torch.Tensor:
        single_threaded()
        key, (first, last) = item
        want = wanted[key]
        info = base.tensors[want.name]
        w, other = scratch(last - first, info.width, working(info.dtype))
        kernel = want.kernel()
        base.read(want.name, first, last, w)
        kernel.apply(w, first - (want.part or (0, 0))[0])
        return column_squares(w, other) if want.axis == "in" else row_norms(w)

    starts = {key: [first for first, _ in want.tiles(base.tensors[want.name])] for key, want in wanted.items()}
    waiting = {key: rows[::-1] for key, rows in starts.items()}  # the next one last
    early: dict[K, dict[int, torch.Tensor]] = {key: {} for key in wanted}
    taken: dict[K, list[torch.Tensor]] = {key: [] for key in wanted}
    items = ((key, tile) for key, want in wanted.items() for tile in want.tiles(base.tensors[want.name]))
    for (key, (start, stop)), found in blocks(items, squares, threads):
        want, info = wanted[key], base.tensors[wanted[key].name]
        if progress is not None:
            progress(info.bytes_of((stop - start) * info.width))
        early[key][start] = found
        while waiting[key] and waiting[key][-1] in early[key]:
            taken[key].append(early[key].pop(waiting[key].pop()))
            if want.axis == "in":
                taken[key] = [sum(taken[key][1:], start=taken[key][0])]
        if not waiting[key]:
            done = taken.pop(key)
            yield key, done[0].sqrt().to(working(info.dtype)) if want.axis == "in" else torch.cat(done)


def dora_norms(
    binding: Binding,
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    bare: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, ‖V‖ along its magnitude's axis) of every update that has a magnitude; ``bare``: ‖W‖."""
    placed = {b.module: (name, b) for name, bounds in binding.bound.items() for b in bounds if b.magnitude is not None}

    @lru_cache(maxsize=_KEPT)
    def kernel(module: str) -> Kernel:
        name, b = placed[module]
        if bare:
            return Unchanged(b.delta.shape)
        return b.delta.kernel(1.0, device, working(binding.base.tensors[name].dtype))

    wanted = {
        module: Normed(name, b.magnitude.axis, partial(kernel, module), b.part)
        for module, (name, b) in placed.items()
        if b.magnitude is not None
    }
    return norms(binding.base, wanted, threads, device, progress)


class LazyTensor:
    """One tensor of a checkpoint, not there yet: ``shape``, ``dtype``, and ``[...]`` gives it, rounded once."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._info = checkpoint.tensors[name]

    @cached_property
    def shape(self) -> torch.Size:
        return torch.Size(self._info.shape)

    @property
    def dtype(self) -> torch.dtype:
        return to_torch(self._info.dtype)

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def __getitem__(self, which: Any) -> torch.Tensor:
        raw = torch.empty(self._info.nbytes, dtype=torch.uint8)
        row = self._info.bytes_of(self._info.width)

        def tile(rows: tuple[int, int]) -> None:
            single_threaded()  # as in a merge to disk: BLAS would sum in another order on several threads
            first, last = rows
            encode(self._checkpoint.read(self._name, first, last), self._info.dtype, raw[first * row : last * row])

        for _ in blocks(tiles(self._info), tile, min(8, os.cpu_count() or 1)):
            pass
        return raw.view(self.dtype).view(self.shape)[which]

    def __repr__(self) -> str:
        return f"LazyTensor({self._name!r}, shape={self._info.shape}, dtype={self._info.dtype})"


class LazyTensors(Mapping[str, LazyTensor]):
    """A checkpoint as a mapping of names to lazy tensors: a ``state_dict`` for transformers, one tensor at a time.

    ``config`` is the config.json that goes with it, as the merge changes it (vocabulary, untied head).
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.config = config

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self.checkpoint.tensors:
            raise KeyError(name)
        return LazyTensor(self.checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)
