"""Where a network's names stand in a base: as they are, under another prefix, or as transformers has renamed them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint import Checkpoint, Ref, TensorInfo, ref
from ..errors import FitError
from .moved import Piece, Whereabouts
from .pieces import Found, shape_of
from .ties import MOVED

Rule = tuple[str, str]  # the prefix that is dropped, and the one that takes its place


@dataclass(frozen=True)
class Places:
    """The names of a base, and how names of the model at run time are spelled there."""

    known: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @cached_property
    def model_type(self) -> str:
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else ""

    @cached_property
    def whereabouts(self) -> Whereabouts:
        return Whereabouts(self.known, self.config)

    def spelled(self, name: str) -> str:
        """A name of the model at run time as this base spells it, where transformers has moved it."""
        if name in self.known:
            return name
        there = self.find(name)
        if len(there) == 1 and there[0][1] is None:
            return there[0][0]
        return name

    def find(self, name: str) -> Found:
        """The tensors that a parameter of the model at run time is in, each with the piece that it is; maybe none."""
        if name not in self._found:
            self._found[name] = self.whereabouts.find(name)
        return self._found[name]

    def expert(self, name: str, number: int) -> Found:
        """Those of them that an expert's matrix is in."""
        if name not in self._experts:
            groups: dict[int | None, list[tuple[str, Piece | None]]] = {}
            for disk, piece in self.find(name):
                groups.setdefault(piece.expert if piece is not None else None, []).append((disk, piece))
            self._experts[name] = groups
        groups = self._experts[name]
        return [*groups.get(number, ()), *groups.get(None, ())]

    @cached_property
    def _found(self) -> dict[str, Found]:
        return {}

    @cached_property
    def _experts(self) -> dict[str, dict[int | None, list[tuple[str, Piece | None]]]]:
        return {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter of the model at run time; None where the base does not tell."""
        return shape_of(self.find(name), self.known)

    def own(self, name: str) -> str:
        """A name of the whole architecture in a base that may hold the inner model alone, without its prefix."""
        spelled = self.spelled(name)
        inner = name.partition(".")[2]
        return inner if spelled not in self.known and inner in self.known else spelled

    def rule(self, modules: Sequence[str], others: Sequence[str] = (), absent: Collection[str] = ()) -> Rule:
        """How these names are renamed to meet the base: the rule that places the most ``modules``, then ``others``.

        ``absent`` ones may be missing from it (a tied head). Raises FitError where two rules fit equally well.
        """
        if all(
            self.spelled(name) in self.known or self.spelled(name) in absent or self.find(name)
            for name in (*modules, *others)
        ):
            return "", ""
        return _prefix_rule(modules, others, self.known)

    def place(self, name: str, rule: Rule) -> str:
        """Where a name stands in the base under a rule, or its best spelling where it is not there."""
        drop, add = rule
        renamed = add + name.removeprefix(drop) if name.startswith(drop) else name
        return next((n for n in (renamed, name) if n in self.known), self.spelled(name))


def places_of(base: Checkpoint) -> Places:
    """Where the names of a network stand in a base."""
    return Places(base.tensors, base.metadata.get("config") or {})


def found(base: Checkpoint, names: Sequence[str], others: Sequence[str] = ()) -> dict[str, Ref]:
    """Those of the names that stand in the base, each with its tensor; ``names`` decide about the prefix.

    Raises FitError where two prefixes fit.
    """
    places = places_of(base)
    rule = places.rule(names, others)
    placed = {name: places.place(name, rule) for name in (*names, *others)}
    return {name: ref(base, there) for name, there in placed.items() if there in base.tensors}


def _prefix_rule(modules: Sequence[str], others: Sequence[str], known: Mapping[str, TensorInfo]) -> Rule:
    """The one prefix that is dropped and the one that is put in its place, so that the most names meet a tensor.

    Names as they are win over every rule. Raises FitError where two rules fit equally well.
    """
    names = (*modules, *others)
    by_end: dict[str, list[str]] = {}
    for name in known:
        by_end.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    samples = sorted(names)[:: max(1, len(names) // 8)]
    rules = {("", "")}
    for sample in samples:
        segments = sample.split(".")
        for cut in range(len(segments) - 1):
            rest = ".".join(segments[cut:])
            drop = ".".join(segments[:cut]) + "." * bool(cut)
            for found in by_end.get(".".join(segments[-2:]), ()):
                if found == rest or found.endswith(f".{rest}"):
                    rules.add((drop, found.removesuffix(rest)))
    moves = {*((a, b) for a, b in MOVED), *((b, a) for a, b in MOVED), ("model.", "model.language_model.")}
    moves |= {
        ("model.language_model.", "model."),
        ("model.", "language_model.model."),
        ("language_model.model.", "model."),
    }
    rules = {
        (drop, add) for drop, add in rules if (drop, add) == ("", "") or not drop or not add or (drop, add) in moves
    }

    def met(rule: Rule, names: Sequence[str]) -> frozenset[str]:
        drop, add = rule
        renamed = (add + name.removeprefix(drop) for name in names if name.startswith(drop))
        return frozenset(name for name in renamed if name in known)

    scores = {rule: (met(rule, modules), met(rule, others)) for rule in rules}
    counts = {rule: (len(first), len(second)) for rule, (first, second) in scores.items()}
    if counts["", ""][0] == max(count for count, _ in counts.values()):
        return "", ""  # whatever the others say
    most = max(counts.values())
    best = sorted((rule for rule in rules if counts[rule] == most), key=lambda r: (len(r[0]), len(r[1]), r))
    if ("", "") in best:
        return "", ""
    rival = next((rule for rule in best if scores[rule] != scores[best[0]] or rule[0] != best[0][0]), None)
    if rival is not None:
        (a, b), (c, d) = best[0], rival
        way = f"say --prefix, e.g. --prefix {a or c}" if a or c else "give a base that holds only that one"
        raise FitError(
            f"The adapter's names fit the base in two ways: '{a}…' as '{b}…' and '{c}…' as '{d}…'. Which network was "
            f"it trained on? If one of them, {way}"
        )
    return best[0]
