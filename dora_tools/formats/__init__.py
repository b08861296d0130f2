"""Adapter formats: a checkpoint with its config ⇄ an Adapter. One module or table per format; none imports another.

A format is a module of this package that defines ``FORMAT``, or a table in ``tables/*.toml`` (see ``table``). Dropping
the file in is all: detection, the choices of the command line and the tests of all formats find it. Other packages
register a ``Format`` under the entry point ``dora_tools.formats``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..adapter import Adapter, Axis
from ..checkpoint import Checkpoint, plain
from ..errors import InputError, UsageError

SCALE_RULES = ("alpha", "alpha/rank", "rslora", "one")


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says of a file that it does not record: alpha and the rule, or the scaling itself; m's axis."""

    alpha: float | None = None
    scaling: float | None = None
    scale_rule: str | None = None
    magnitude_axis: Axis | None = None
    inside: str | None = None  # the format inside a wrapper

    def __post_init__(self) -> None:
        if self.scale_rule not in (None, *SCALE_RULES):
            raise UsageError(f"There is no scale rule '{self.scale_rule}'; known are {', '.join(SCALE_RULES)}.")
        if self.scaling is not None and (self.alpha is not None or self.scale_rule is not None):
            raise UsageError(
                "--scaling is the number that is multiplied; it leaves nothing for --alpha or --scale-rule."
            )


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader made of a file: the adapter, the base that came with it, and the names left aside, with why."""

    adapter: Adapter
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer wants on disk: tensors for one weight file of that name, small files beside it, what to know."""

    tensors: Checkpoint
    file: str
    documents: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """One dialect. ``sniff`` looks at names and config only; ``read`` raises InputError; ``write`` TargetError.

    ``unwraps``: it takes a wrapper off and hands what is inside back to detection.
    """

    name: str
    about: str
    sniff: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, Given], Reading]
    write: Callable[[Adapter], Written] | None = None
    unwraps: bool = False


@cache
def formats() -> dict[str, Format]:
    """All formats by name, in the order in which they are tried."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded: Any = importlib.import_module(f"{__name__}.{module.name}")
        for candidate in (getattr(loaded, "FORMAT", None), *getattr(loaded, "FORMATS", ())):
            if isinstance(candidate, Format):
                found[candidate.name] = candidate
    for point in entry_points(group="dora_tools.formats"):
        candidate = point.load()
        if not isinstance(candidate, Format):
            raise InputError(f"The plug-in {point.value} is not a dora_tools Format.")
        found.setdefault(candidate.name, candidate)
    return found


def named(name: str) -> Format:
    """The format of that name, or of the table in that ``.toml`` file. Raises UsageError, InputError for the table."""
    if name.endswith(".toml"):
        from .table import load

        return load(Path(name)).format()
    known = formats()
    if name not in known:
        raise UsageError(f"There is no format '{name}'; known are {', '.join(sorted(known))}, or a table FILE.toml.")
    return known[name]


def read(checkpoint: Checkpoint, where: str, name: str | None = None, given: Given | None = None) -> Reading:
    """Read an adapter in the named or the detected format. Raises InputError, UsageError for an unknown name."""
    given = given or Given()
    chosen = named(name) if name is not None else None
    for candidate in formats().values():
        if candidate.unwraps and candidate.sniff(checkpoint):
            return candidate.read(checkpoint, replace(given, inside=name if chosen is not candidate else None))
    for candidate in formats().values() if chosen is None else (chosen,):
        if chosen is not None or candidate.sniff(checkpoint):
            return candidate.read(plain(checkpoint, where), given)
    keys = ", ".join(list(checkpoint.tensors)[:4])
    raise InputError(
        f"{where} is not recognised as an adapter: {len(checkpoint.tensors)} tensors ({keys}{', …' if keys else ''}) "
        f"and no adapter_config.json beside them. Formats that can be read: {', '.join(sorted(formats()))}."
    )
