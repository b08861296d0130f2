"""Signs in the values that an adapter was trained on this very base, with its rows in this order.

PEFT starts a DoRA's magnitude as the row norms of the base, and training moves it little. So m still correlates with
the row norms of the right base in the right order, and with those of no other: the one check that names and shapes
cannot make. A plain LoRA carries no such sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from .adapter import loaded
from .binding import Binding, Bound
from .checkpoint import blocks, single_threaded, tiles
from .errors import FitError
from .lowrank import row_norms
from .names.gguf import Dialect, inverse, row_order

_FEW = 24  # fewer rows than this correlate by chance
_GOOD, _CLEAR = 0.6, 0.3  # short trainings leave 0.99 and more, the longest seen 0.7; other orders give 0.1


@dataclass(frozen=True, slots=True)
class Sign:
    """corr(m, ‖W‖ of the rows) of one module, and the same for the HF order of rows where that is another."""

    module: str
    correlation: float
    other: float | None = None


def signs(binding: Binding, dialect: Dialect, threads: int) -> list[Sign]:
    """The sign of each DoRA'd module of enough rows, from the first tile of its weight."""

    def sign(item: tuple[str, Bound]) -> Sign | None:
        single_threaded()
        name, bound = item
        assert bound.magnitude is not None
        info = binding.base.tensors[name]
        start, end = bound.part or (0, info.rows)
        last = min(end, start + tiles(info)[0][1])
        norms = row_norms(binding.base.read(name, start, last).float()).double()
        m = loaded(bound.magnitude.vector, "cpu", torch.float32, False).double().abs()
        found = _correlation(m[: last - start], norms)
        if found is None:
            return None
        place = dialect.heads_of(name.removesuffix(".weight"))
        order = row_order(len(m), place) if place and not bound.part else []
        other = _correlation(m[inverse(order)][: last - start], norms) if order else None
        return Sign(bound.module, found, other)

    wanted = [
        (name, bound)
        for name, bounds in binding.bound.items()
        for bound in bounds
        if bound.magnitude is not None and bound.magnitude.axis == "out"
    ]
    return sorted((s for _, s in blocks(wanted, sign, threads) if s is not None), key=lambda s: s.module)


def judged(found: list[Sign]) -> list[str]:
    """What the signs say, as notes. Raises FitError where the rows of q and k are clearly in the HF order."""
    if not found:
        return []
    ordered = [s for s in found if s.other is not None]
    if ordered:
        ours, theirs = median(s.correlation for s in ordered), median(s.other or 0.0 for s in ordered)
        if theirs > ours + _CLEAR and theirs > _GOOD:
            raise FitError(
                f"The base has the rows of {ordered[0].module} (and others) in the Hugging Face order, not in "
                f"llama.cpp's: the adapter's magnitudes correlate with its row norms by {theirs:.2f} in that order and "
                f"by {ours:.2f} in llama.cpp's. llama.cpp could not run such a file; convert the base again."
            )
    middle = median(s.correlation for s in found)
    if middle < _GOOD:
        lowest = min(found, key=lambda s: s.correlation)
        return [
            "Is this the right base? The adapter's magnitudes, which begin as the base's row norms, correlate with "
            f"them by {middle:.2f} only (median of {len(found)} modules; {lowest.module} {lowest.correlation:.2f}), "
            "where the base that it was trained on gives nearly 1."
        ]
    return []


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Pearson's; None for few or (nearly) equal values, which say nothing."""
    if len(a) < _FEW or not bool(a.isfinite().all()):
        return None
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else None
