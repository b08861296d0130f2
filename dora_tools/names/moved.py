"""What transformers 5 calls the tensors that it reads from disk, and which of them it assembles to one parameter.

``moved.json`` is made by fixtures/make_moved.py from the conversion mapping of transformers. Names of adapters and of
bases are both brought to those that the model has at run time under transformers 5, where they meet. That also finds
what transformers 4 called a tensor, and the experts of a base that has them stacked on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from ..errors import FitError

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # all experts of a layer are named alike: one is renamed for all


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor stands in another, the whole.

    ``expert``: its index along dim 0 of the whole, if that is stacked. ``part`` of ``parts``: those that are
    concatenated along ``dim`` of the whole, of which a stacked dim 0 counts as one. ``turned``: the last two dims are
    exchanged; None: where the shapes say so. ``whole_on_disk``: the whole is what is on disk, and its parts are equally
    long. ``unknown``: operations of transformers of which nothing is known here, so that nothing else holds.
    """

    expert: int | None = None
    part: int = 0
    parts: int = 1
    dim: int = 0
    turned: bool | None = False
    whole_on_disk: bool = False
    unknown: str = ""


Placed = tuple[str, Piece | None]  # a name, and how its tensor and another belong together; None: they are the same


@dataclass(frozen=True, slots=True)
class _Rule:
    """A transform of transformers: what the first of the sources finds in a name, makes way for the target."""

    scopes: tuple[str, ...]  # it holds for names with one of these prefixes
    sources: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]
    layout: str  # of the tensors; empty where only the name changes

    def apply(self, name: str) -> tuple[str, int] | None:
        """The new name, and the number of the source; None where nothing is found."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        for number, source in enumerate(() if scope is None else self.sources):
            rest = name.removeprefix(scope or "")
            if match := source.search(rest):
                target = self.targets[number if len(self.targets) > 1 and not self.layout else 0]
                target = target.replace(r"\1", match[1]) if r"\1" in target else target
                return f"{scope}{rest.replace(match[0], target, 1)}", number
        return None

    def places(self, name: str, source: int) -> Iterator[Placed]:
        """The parameters that a tensor takes part in, by what ``apply`` gave."""
        kind, _, rest = self.layout.partition(" ")
        dim = int(re.sub(r"\D", "", self.layout) or 0)
        for number, target in enumerate(self.targets):
            piece = Piece(0 if kind == "stack" else None, source, len(self.sources), dim)
            if kind == "unknown":
                piece = Piece(unknown=rest)
            elif kind.startswith("cut"):
                piece = Piece(None, number, len(self.targets), dim, whole_on_disk=True)
            elif kind.startswith("turn"):
                piece = Piece(turned=None if kind == "turn?" else True)
            yield name.replace(self.targets[0], target, 1), piece


class Moved:
    """The names that transformers 5 gives to the tensors of one model, told by its config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        prefix, *parts = _row(config)
        self.prefix = f"{prefix}." if prefix else ""  # of the inner model, which a base may hold alone
        scoped = [*_scoped(parts, config), (None, "legacy")]
        rules = [rule for scope, key in scoped for rule in _rules(self.prefix, scope, key)]
        self._renamings = [rule for rule in rules if not rule.layout]
        self._converters = [rule for rule in rules if rule.layout]
        self._known: dict[str, tuple[Placed, ...]] = {}

    def runtime(self, name: str) -> tuple[Placed, ...]:
        """The parameters at run time that a tensor on disk belongs to.

        A name that is one of run time already, or was one under transformers 4, comes to the same.
        """
        if expert := EXPERT.search(name):
            first = self._runtime(f"{name[: expert.start()]}0{name[expert.end() :]}")
            if first[0][1] and first[0][1].expert is not None:
                return tuple([(to, _nth(piece, int(expert[0]))) for to, piece in first])
        return self._runtime(name)

    def _runtime(self, name: str) -> tuple[Placed, ...]:
        if name not in self._known:
            new = name
            for rule in self._renamings:
                new, _ = rule.apply(new) or (new, 0)
            made = next((rule.places(*found) for rule in self._converters if (found := rule.apply(new))), None)
            self._known[name] = ((new, None),) if made is None else tuple(made)
        return self._known[name]


class Whereabouts:
    """Where a base has the tensors that an adapter speaks of, by whichever of their names."""

    def __init__(self, names: Iterable[str], config: Mapping[str, Any]) -> None:
        self.moved = Moved(config)
        self._disk: dict[str, dict[Piece | None, list[str]]] = {}  # by the name at run time
        for name in names:
            for to, piece in self.moved.runtime(name):
                self._disk.setdefault(to, {}).setdefault(piece, []).append(name)

    def find(self, name: str) -> list[Placed]:
        """The tensors on disk that make up the one of that name, or hold it; none if there are none.

        Raises FitError where only some of them are there, or two for one place.
        """
        found = [one for to, own in self.moved.runtime(name) for one in self._at(to, own, name)]
        found = list(dict.fromkeys(found or self._at(name, None, name)))  # that rules do not move it twice
        pieces = [p for _, p in found if p and not p.whole_on_disk and not p.unknown]
        if pieces and len(pieces) != (max(p.expert or 0 for p in pieces) + 1) * pieces[0].parts:
            raise FitError(f"The base has only some of the tensors that {name} is made of, {found[0][0]} among them.")
        return found

    def _at(self, to: str, own: Piece | None, name: str) -> Iterator[Placed]:
        """The tensors on disk that have to do with the one of that name, which is that piece of a parameter."""
        prefix = self.moved.prefix
        there = next((self._disk[n] for n in (to, to.removeprefix(prefix), prefix + to) if n in self._disk), {})
        for piece in there if own is None else {own, None} & there.keys():
            how = piece
            if own and own.turned is not None:
                how = None if piece else replace(own, whole_on_disk=not own.whole_on_disk)
            disk = [name] if name in there[piece] else there[piece]
            if len(disk) > 1 and not (piece and piece.unknown):
                raise FitError(f"{name} can be {disk[0]} as well as {disk[1]} of the base.")
            yield from ((one, how) for one in disk)


@cache
def _nth(piece: Piece | None, expert: int) -> Piece | None:
    return piece and replace(piece, expert=expert)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files(__package__) / "moved.json").read_text())
    return table | {"rows": {name: row[:-1] for row in table["models"] for name in row[-1].split()}}


def _row(config: Mapping[str, Any]) -> list[str]:
    """The prefix of the inner model, and its parts that have rules."""
    named = config.get("architectures")
    names = (named[0] if isinstance(named, list) and named else None, config.get("model_type"))
    rows: dict[str, list[str]] = _table()["rows"]
    return next((rows[name] for name in names if isinstance(name, str) and name in rows), [""])


def _scoped(parts: Iterable[str], config: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
    """The keys of the rules, each with the prefix below which they hold; None: they hold for all names."""
    fields = dict(part.split("@") for part in parts if "@" in part)
    inners = {scope: inner for scope, field in fields.items() if isinstance(inner := config.get(field), Mapping)}
    told = {scope: inner for scope, inner in inners.items() if "model_type" in inner}
    for scope, colon, key in (part.rpartition(":") for part in parts if "@" not in part):
        if not colon or not any(f"{scope}.".startswith(f"{outer}.") for outer in told):
            yield scope if colon else None, key
    for outer, inner in told.items():
        for below, key in _scoped(_row({"model_type": inner["model_type"]})[1:], inner):
            yield f"{outer}.{below}" if below else outer, key


def _rules(prefix: str, scope: str | None, key: str) -> Iterator[_Rule]:
    scopes = [""] if scope is None else [f"{outer}{scope}." if scope else outer for outer in (prefix, "")]
    for row in _table()["rules"][key]:
        sources, targets = ([one] if isinstance(one, str) else one for one in row[:2])
        yield _Rule(tuple(scopes), tuple(map(_compiled, sources)), tuple(targets), *row[2:] or [""])


@cache
def _compiled(source: str) -> re.Pattern[str]:
    """As WeightTransform of transformers reads a source: it ends where a word does, and * stands for anything."""
    return re.compile(source.replace("*.", r".*\.") + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", source) else ""))
