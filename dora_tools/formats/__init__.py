"""Adapter formats: a checkpoint with its config ⇄ an Adapter. One module per format; none imports another.

A format is a module of this package that defines ``FORMAT``. Dropping the file in is all: detection, the choices of
the command line and the round-trip tests find it by that name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..adapter import Adapter
from ..checkpoint import Checkpoint
from ..errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader made of a file: the adapter, and the names that it left aside, with the reason."""

    adapter: Adapter
    left_out: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer wants on disk: tensors for one weight file of that name, and small files beside it."""

    tensors: Checkpoint
    file: str
    documents: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Format:
    """One dialect. ``sniff`` looks at names and config only; ``read`` raises InputError; ``write`` TargetError."""

    name: str
    about: str
    sniff: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], Reading]
    write: Callable[[Adapter], Written] | None = None


@cache
def formats() -> dict[str, Format]:
    """All formats by name."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        candidate: Any = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMAT", None)
        if isinstance(candidate, Format):
            found[candidate.name] = candidate
    return found


def read(checkpoint: Checkpoint, where: str, name: str | None = None) -> Reading:
    """Read an adapter in the named or the detected format. Raises InputError, UsageError for an unknown name."""
    known = formats()
    if name is not None:
        if name not in known:
            raise UsageError(f"There is no format '{name}'; known are {', '.join(sorted(known))}.")
        return known[name].read(checkpoint)
    for candidate in known.values():
        if candidate.sniff(checkpoint):
            return candidate.read(checkpoint)
    keys = ", ".join(list(checkpoint.tensors)[:4])
    raise InputError(
        f"{where} is not recognised as an adapter: {len(checkpoint.tensors)} tensors ({keys}{', …' if keys else ''}) "
        f"and no adapter_config.json beside them. Formats that can be read: {', '.join(sorted(known))}."
    )
