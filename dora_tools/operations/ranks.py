"""How many singular values of each module are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from ..errors import FitError, UsageError


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of a module's delta, descending; ``total``: Σ σ² of all, the uncomputed ones too.

    ``shape``: (out, in) of the matrix.
    """

    values: Sequence[float]
    total: float
    shape: tuple[int, int]

    def kept(self, rank: int) -> float:
        """The energy Σ σ² of the first ``rank``, as a fraction; 1 for a delta of zero."""
        return min(1.0, sum(v * v for v in self.values[:rank]) / self.total) if self.total else 1.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """A rule for the ranks, by exactly one of these.

    ``rank``: this for all (at most the smaller side of a matrix). ``energy``: the least that keeps this part of Σ σ².
    ``ratio``: σ greater than the largest divided by this. ``parameters``: a budget for the whole adapter, spent where a
    parameter gains the most energy. ``most`` caps the other three. Raises UsageError for values out of range.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    parameters: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("rank", "energy", "ratio", "parameters") if getattr(self, n) is not None]
        if len(given) != 1:
            said = " and ".join(f"--{name}" for name in given) or "none of them"
            raise UsageError(f"Ranks follow from one of --rank, --energy, --ratio and --parameters, not from {said}.")
        for name in ("rank", "parameters", "most"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.rank is not None and self.most is not None:
            raise UsageError("A rank for all needs no highest rank: say --max-rank with energy, ratio or parameters.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a part of the whole, greater than 0 and at most 1, not {self.energy!r}.")
        if self.ratio is not None and not (isfinite(self.ratio) and self.ratio >= 1):
            raise UsageError(f"ratio divides the largest singular value and is at least 1, not {self.ratio!r}.")

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse what no module can have, before any work. Raises FitError."""
        if not shapes:
            return
        largest = max(min(shape) for shape in shapes.values())
        if self.rank is not None and self.rank > largest:
            raise FitError(f"Rank {self.rank} is more than any of the matrices can have ({largest} at most).")
        least = sum(out + in_ for out, in_ in shapes.values())
        if self.parameters is not None and self.parameters < least:
            raise FitError(f"{self.parameters} parameters are too few: rank 1 everywhere takes {least}.")

    def cap(self, shape: tuple[int, int], shapes: Mapping[str, tuple[int, int]]) -> int:
        """The highest rank that can come out for a module: how much of a spectrum must be known."""
        most = min(*shape, self.most or max(shape))
        if self.rank is not None:
            return min(self.rank, *shape)
        if self.parameters is not None:  # four times the even share is as far as the budget is spread
            return max(1, min(most, 4 * self.parameters // sum(out + in_ for out, in_ in shapes.values())))
        return most

    def of(self, spectrum: Spectrum) -> int | None:
        """The rank of one module, at least 1; None for a budget, which all must share."""
        most = max(1, min(len(spectrum.values), *spectrum.shape, self.most or max(spectrum.shape)))
        if self.rank is not None:
            return min(self.rank, *spectrum.shape)
        if self.energy == 1:
            return max(1, min(most, sum(value > 0 for value in spectrum.values)))
        if self.energy is not None:
            sought, kept = self.energy * spectrum.total, 0.0
            for count, value in enumerate(spectrum.values[:most], 1):
                kept += value * value
                if kept >= sought * (1 - 1e-12):
                    return count
            return most
        if self.ratio is not None:
            return max(1, min(most, sum(value * self.ratio > spectrum.values[0] for value in spectrum.values)))
        return None

    def choose(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """The rank of every module."""
        if self.parameters is None:
            return {module: self.of(spectrum) or 1 for module, spectrum in spectra.items()}
        ranks = dict.fromkeys(spectra, 1)
        left = self.parameters - sum(sum(s.shape) for s in spectra.values())
        gains = [
            (-(value * value) / sum(s.shape), index, module)
            for module, s in spectra.items()
            for index, value in enumerate(s.values[: self.most or None])
            if index and value > 0
        ]
        for _, index, module in sorted(gains):  # σ descends within a module, so its own come in order
            cost = sum(spectra[module].shape)
            if cost <= left and ranks[module] == index:
                ranks[module], left = index + 1, left - cost
        return ranks
