"""What an operation gives: an adapter, and how good it is, as data, JSON and a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, LowRank, Update
from ..binding import Bound, bind
from ..checkpoint import Checkpoint
from ..compare import distances
from ..errors import UnsupportedError
from ..merging import Merged

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "dora-tools/operation/1"


@dataclass(frozen=True, slots=True)
class Module:
    """One module. Norms are Frobenius; None where they were not measured.

    ``delta``: ‖Δ‖ of what is approximated, s·BA or W' − W. ``error``: ‖Δ − Δ_k‖. ``weight``: ‖W'‖. ``dropped``: the
    error that leaving the magnitude out would make.
    """

    module: str
    shape: tuple[int, int]
    rank_before: int | None
    rank: int | None
    delta: float | None = None
    error: float | None = None
    weight: float | None = None
    dropped: float | None = None

    @property
    def kept(self) -> float | None:
        """The part of the energy ‖Δ‖² that is kept."""
        return _kept(self.error, self.delta)


def _kept(error: float | None, delta: float | None) -> float | None:
    if error is None or delta is None:
        return None
    return max(0.0, 1 - (error / delta) ** 2) if delta else 1.0


@dataclass(frozen=True)
class Outcome:
    """An adapter made by an operation, with what became of each module, and notes."""

    operation: str
    adapter: Adapter
    modules: tuple[Module, ...] = ()
    notes: tuple[str, ...] = ()
    schema: str = field(default=SCHEMA)

    @property
    def total(self) -> Module | None:
        """All modules together; None where nothing was measured."""
        measured = [m for m in self.modules if m.error is not None and m.delta is not None]
        if not measured:
            return None

        def norm(name: str) -> float | None:
            values = [getattr(m, name) for m in measured]
            return None if any(v is None for v in values) else sqrt(sum(v * v for v in values))

        return Module("total", (0, 0), None, None, norm("delta"), norm("error"), norm("weight"), norm("dropped"))

    def as_json(self) -> dict[str, Any]:
        """The versioned schema of ``--json``."""
        total = self.total
        return {
            "schema": self.schema,
            "operation": self.operation,
            "modules": [{**asdict(m), "kept_energy": m.kept} for m in self.modules],
            "total": None if total is None else _ratios(total),
            "notes": [*self.adapter.notes, *self.notes],
        }

    def table(self) -> Iterator[RenderableType]:
        """A line for each group of like modules, then the total.

        "energy": the part that is kept of ‖Δ‖²; "error": ‖Δ − Δ_k‖/‖Δ‖, and the same against ‖W'‖.
        """
        from rich.table import Table

        groups: dict[tuple[str, tuple[int, int]], list[Module]] = defaultdict(list)
        for m in self.modules:
            groups[m.module.rpartition(".")[2], m.shape].append(m)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("modules", "count", "out × in", "rank", "→"):
            table.add_column(head, justify="left" if head == "modules" else "right", no_wrap=True)
        measured = self.total is not None
        for head in ("energy", "error", "of ‖W'‖", "without m") if measured else ():
            table.add_column(head, justify="right", no_wrap=True)
        for (name, (out, in_)), members in groups.items():
            before, after = ([m.rank_before for m in members], [m.rank for m in members])
            row = [name, str(len(members)), f"{out} × {in_}", _range(before), _range(after)]
            if measured:
                part = replace(self, modules=tuple(members)).total
                row += _cells(part)
            table.add_row(*row)
        if measured and len(groups) > 1:
            table.add_row("total", str(len(self.modules)), "", "", "", *_cells(self.total))
        yield table


def _ratios(total: Module) -> dict[str, float | None]:
    delta, error = total.delta or 0.0, total.error or 0.0
    return {
        "delta": total.delta,
        "error": total.error,
        "kept_energy": total.kept,
        "relative_error_of_delta": error / delta if delta else 0.0,
        "relative_error_of_weight": error / total.weight if total.weight else None,
        "relative_error_without_magnitude": total.dropped / delta if total.dropped is not None and delta else None,
    }


def _cells(total: Module | None) -> list[str]:
    if total is None:
        return ["–"] * 4
    values = _ratios(total)
    kept = total.kept
    cells = ["–" if kept is None else f"{100 * kept:.4g} %"]
    for key in ("relative_error_of_delta", "relative_error_of_weight", "relative_error_without_magnitude"):
        value = values[key]
        cells.append("–" if value is None else f"{value:.3g}")
    return cells


def _range(values: list[int | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    return str(known[0]) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def measured(
    modules: Sequence[Module],
    adapter: Adapter,
    base: Checkpoint,
    tuned: Checkpoint,
    places: Mapping[str, str],
    device: str,
    threads: int,
) -> list[Module]:
    """Modules with the error of the merged weight, the factors being as they are stored."""
    again = Merged(bind([(adapter, 1.0)], base), device)
    there = {m.module: places[m.module] for m in modules if m.module in places}
    found = distances(again, tuned, list(there.values()), threads, device)
    return [
        replace(m, error=found[there[m.module]].difference, weight=found[there[m.module]].size)
        if m.module in there
        else m
        for m in modules
    ]


def rank_of(update: Update) -> int | None:
    return update.delta.rank if isinstance(update.delta, LowRank) else None


def by_module(bound: Mapping[str, tuple[Bound, ...]]) -> dict[str, str]:
    """Module → the base tensor that it changes; without those that change a part of one, or several."""
    found: dict[str, set[str]] = {}
    parts: set[str] = set()
    for name, bounds in bound.items():
        for b in bounds if name.endswith("weight") else ():
            found.setdefault(b.module, set()).add(name)
            parts |= {b.module} if b.part is not None else set()
    return {module: min(names) for module, names in found.items() if len(names) == 1 and module not in parts}


def refuse_parts(modules: Iterable[str], places: Mapping[str, str]) -> None:
    """Raises UnsupportedError for a module whose change of the base is not that of one tensor."""
    odd = next((module for module in modules if module not in places), None)
    if odd is not None:
        raise UnsupportedError(
            f"{odd} is a part of a tensor of this base, or in several of them, and its change there is not measured. "
            "Merge the adapter instead."
        )
