"""What transformers 5 calls the tensors that it reads from disk, and which of them it assembles to one parameter.

``moved.json`` is made by fixtures/make_moved.py from the conversion mapping of transformers. Names of adapters and of
bases are both brought to the names that the model has at run time under transformers 5, where they meet: this also
finds what transformers 4 called a tensor, and a base whose experts are stacked on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # all experts of a layer are named alike: one is renamed for all


@dataclass(frozen=True, slots=True)
class Piece:
    """What a tensor on disk is of a tensor of the model.

    ``expert``: its index where dim 0 is stacked; None: not stacked. ``part`` of ``parts`` along ``dim`` (of the whole,
    the stacked one counted). ``turned``: its last two dims are exchanged; None: only if its shape says so. ``cut``: the
    other way round, the model's tensor is that piece of the one on disk, and the parts are equally long. ``by``:
    operations of transformers that are not described here; nothing else holds then.
    """

    expert: int | None = None
    part: int = 0
    parts: int = 1
    dim: int = 0
    turned: bool | None = False
    cut: bool = False
    by: str = ""


@dataclass(frozen=True, slots=True)
class _Rule:
    """One of transformers' transforms: the first of ``sources`` that occurs in a name makes way for its target."""

    sources: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]
    layout: str | None  # None: a new name and nothing else
    scopes: tuple[str, ...] = ("",)  # it holds below the first of these prefixes that the name has

    def renamed(self, name: str) -> tuple[str, int] | None:
        """The new name, and which of the sources was found."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        if scope is None:
            return None
        rest = name[len(scope) :]
        for number, source in enumerate(self.sources):
            if match := source.search(rest):
                pairs = self.layout is None and len(self.targets) == len(self.sources)
                target = self.targets[number if pairs else 0]
                target = target.replace(r"\1", match[1]) if r"\1" in target else target
                return scope + rest.replace(match[0], target, 1), number
        return None

    def placed(self, name: str, source: int) -> Iterator[tuple[str, Piece]]:
        """The parameters that a tensor takes part in, by the name that ``renamed`` gave and its number."""
        kinds = self.layout.split() if self.layout else []
        joined = next((kind for kind in kinds if kind.startswith(("join", "cut"))), "join0")
        dim = int(joined[-1])
        first, _, last = name.partition(self.targets[0])
        for number, target in enumerate(self.targets):
            if "unknown" in kinds:
                piece = Piece(by=", ".join(kinds[1:]))
            elif joined.startswith("cut"):
                piece = Piece(part=number, parts=len(self.targets), dim=dim, cut=True)
            else:
                turned = True if "turn" in kinds else None if "turn?" in kinds else False
                piece = Piece(0 if "stack" in kinds else None, source, len(self.sources), dim, turned)
            yield first + target + last, piece


class Moved:
    """The names that transformers 5 gives to the tensors of one architecture, told by its config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        group = _group(config)
        self.prefix = f"{group['prefix']}." if group["prefix"] else ""  # of the inner model; a base may lack it
        self._renamings, self._converters = [], []
        for scope, key in _scoped(group, config, "", ()):
            for sources, targets, layout in _table()["rules"][key]:
                scopes = ("",) if scope is None else (f"{self.prefix}{scope}".rstrip("."), scope)
                rule = _Rule(
                    tuple(map(_compiled, sources)), tuple(targets), layout, tuple(f"{s}." if s else "" for s in scopes)
                )
                (self._renamings if layout is None else self._converters).append(rule)
        self._known: dict[str, tuple[tuple[str, Piece | None], ...]] = {}
