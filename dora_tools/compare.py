"""Two checkpoints, tile by tile: how far apart tensors of the same name are, and what storing one does to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

import torch

from .checkpoint import Checkpoint, blocks, single_threaded, tiles
from .dtypes import decode, working


@dataclass(frozen=True, slots=True)
class Distance:
    """Frobenius norms: of the difference of two tensors, and of the second of them."""

    difference: float
    size: float

    @property
    def relative(self) -> float:
        return self.difference / self.size if self.size else float("inf") if self.difference else 0.0


def distances(
    a: Checkpoint,
    b: Checkpoint,
    names: Iterable[str],
    threads: int = 1,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Mapping[str, Distance]:
    """‖A − B‖ and ‖B‖ of each tensor, which both must have in the same shape; sums are float64, in row order.

    ``progress`` is called with the bytes of ``b`` that were compared.
    """
    for checkpoint in (a, b):
        prepare = getattr(checkpoint, "prepare", None)
        if prepare is not None:
            prepare(threads)
    local = threading.local()

    def squares(item: tuple[str, tuple[int, int]]) -> tuple[float, float]:
        single_threaded()
        name, (first, last) = item
        info = b.tensors[name]
        size, dtype = (last - first) * info.width, working(info.dtype)
        pair = getattr(local, "pair", None)
        if pair is None or pair[0].numel() < size or pair[0].dtype != dtype:
            pair = local.pair = tuple(torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        x, y = (buffer[:size].view(last - first, info.width) for buffer in pair)
        a.read(name, first, last, x)
        b.read(name, first, last, y)
        x.sub_(y)
        return _squares(x), _squares(y)

    names = list(names)
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    items = ((name, tile) for name in names for tile in tiles(b.tensors[name]))
    for (name, (first, last)), sums in blocks(items, squares, threads):
        found[name][first] = sums
        if progress is not None:
            info = b.tensors[name]
            progress(info.bytes_of((last - first) * info.width))
    ordered = {name: [sums[first] for first in sorted(sums)] for name, sums in found.items()}
    return {n: Distance(sqrt(sum(d for d, _ in sums)), sqrt(sum(s for _, s in sums))) for n, sums in ordered.items()}


@dataclass(frozen=True, slots=True)
class Rounded:
    """What storing W' as W'q did to Δ = W' − W, of one tensor or of several.

    ``change``: ‖Δ‖ / ‖W'‖, of ``elements`` numbers. ``gain``: ⟨W'q − W, Δ⟩ / ‖Δ‖², 1 where Δ is there in full and 0
    where it was rounded away; ``error``: ‖W'q − W'‖ / ‖Δ‖ (both None where Δ is 0); ``relative``: ‖W'q − W'‖ / ‖W'‖.
    """

    gain: float | None
    error: float | None
    relative: float
    change: float
    elements: int

    @property
    def left(self) -> float:
        """How much of Δ is there: the gain, where that is more than 0."""
        return max(0.0, self.gain or 0.0)

    @property
    def lost(self) -> bool:
        """Whether less than half of Δ is there, or half too much, beyond what the noise of rounding may feign.

        A Δ of the size of float32's own rounding is none.
        """
        if self.gain is None or self.error is None or self.change < 1e-6 or not isfinite(self.gain):
            return False
        return abs(self.gain - 1) > 0.5 + 3 * self.error / sqrt(self.elements)


class Rounding:
    """Measures ``Rounded`` while a merge is written, on up to ``_MEASURED`` tiles of each tensor, evenly spread.

    To be called with each tile: name, rows [first, last), the values, and the bytes that they were rounded to.
    """

    _MEASURED = 4

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._sums: dict[str, dict[int, tuple[float, float, float, float, int]]] = {}
        self._wanted: dict[str, frozenset[int]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, first: int, last: int, values: torch.Tensor, raw: torch.Tensor, dtype: str) -> None:
        if name not in self._wanted:
            cut = tiles(self._base.tensors[name])
            self._wanted[name] = frozenset(start for start, _ in cut[:: -(-len(cut) // self._MEASURED)])
        if first not in self._wanted[name]:
            return
        merged = values.float().cpu()
        stored = decode(raw, dtype).view(merged.shape).float()
        delta = merged - self._base.read(name, first, last).float()
        rounding = stored - merged
        sums = (
            float((rounding.double() * delta).sum()),
            _squares(delta),
            _squares(rounding),
            _squares(merged),
            merged.numel(),
        )
        with self._lock:
            self._sums.setdefault(name, {})[first] = sums

    @property
    def tensors(self) -> dict[str, Rounded]:
        """Of each tensor that was measured."""
        return {name: self._of([name]) for name in sorted(self._sums)}

    def total(self, names: Iterable[str]) -> Rounded:
        """Of all these tensors together."""
        return self._of([name for name in names if name in self._sums])

    def _of(self, names: list[str]) -> Rounded:
        rows = [self._sums[name][first] for name in names for first in sorted(self._sums[name])]
        along, delta, rounding, size, count = (sum(row[i] for row in rows) for i in range(5))
        relative, change = (sqrt(x / size) if size else 0.0 for x in (rounding, delta))
        gain, error = (1 + along / delta, sqrt(rounding / delta)) if delta else (None, None)
        return Rounded(gain, error, relative, change, int(count))


def _squares(x: torch.Tensor) -> float:
    """Σ x², with float32 sums of one row only."""
    return float(torch.linalg.vector_norm(x, dim=1).double().square().sum())
