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
from typing import Any, Literal

from ..adapter import Adapter, Axis
from ..checkpoint import Checkpoint, View, plain
from ..errors import InputError, UsageError

SCALE_RULES = ("alpha", "alpha/rank", "rslora", "one")


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says of a file that it does not record: alpha and the rule, or the scaling itself; m's axis.

    ``enable_lora``: which parts of a fused layer have factors, by the end of its path ("" for all). ``saved_in``: the
    mode of layers that merge themselves on eval. ``prefix``: what stands before the adapted network's names. ``base``
    opens the base, for what only its shapes tell. ``inside``: the format inside a wrapper.
    """

    alpha: float | None = None
    scaling: float | None = None
    scale_rule: str | None = None
    magnitude_axis: Axis | None = None
    enable_lora: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    saved_in: Literal["train", "eval"] | None = None
    prefix: str = ""
    base: Callable[[], Checkpoint] | None = None
    inside: str | None = None

    def __post_init__(self) -> None:
        if self.scale_rule not in (None, *SCALE_RULES):
            raise UsageError(f"There is no scale rule '{self.scale_rule}'; known are {', '.join(SCALE_RULES)}.")
        if self.scaling is not None and (self.alpha is not None or self.scale_rule is not None):
            raise UsageError(
                "--scaling is the number that is multiplied; it leaves nothing for --alpha or --scale-rule."
            )


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader made of a file: the adapter, the base that came with it, and the names left aside, with why.

    ``merged``: whether that base holds the update already; None where nobody can tell. ``doubt``: a sentence on what
    only the base can tell, of a file that was read without one.
    """

    adapter: Adapter
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: Checkpoint | None = None
    merged: bool | None = False
    doubt: str = ""

    def within(self, prefix: str) -> Reading:
        """The network whose names begin with ``prefix``, without it; what is outside is left out."""
        adapter, base = self.adapter, self.base
        names = [*adapter.replaced, *(base.tensors if base else ()), *(u.module + "." for u in adapter.updates)]
        outside = {n.rstrip("."): f"not in the adapted network ({prefix}…)" for n in names if not n.startswith(prefix)}
        updates = tuple(replace(u, module=u.module.removeprefix(prefix)) for u in adapter.updates
                        if u.module.startswith(prefix))  # fmt: skip
        replaced = {n.removeprefix(prefix): r for n, r in adapter.replaced.items() if n.startswith(prefix)}
        if base is not None:
            inside = [name for name in base.tensors if name.startswith(prefix)]
            base = View(
                {name.removeprefix(prefix): (base, name) for name in inside},
                {name.removeprefix(prefix): base.tensors[name] for name in inside},
                base.metadata,
            )
        note = f"The network is the checkpoint's '{prefix}…'; its names are given without that."
        named = replace(adapter, updates=updates, replaced=replaced, notes=(*adapter.notes, note))
        return replace(self, adapter=named, left_out={**self.left_out, **outside}, base=base)


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer wants on disk: tensors for one weight file of that name, small files beside it, what to know."""

    tensors: Checkpoint
    file: str
    documents: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """Numbers that a format must reproduce: an adapter's tensors, a base (if not among them), the merged weights.

    Tensors are nested lists; ``given`` are options of Given; ``hparams`` and ``config`` stand beside the tensors.
    """

    tensors: Mapping[str, Any]
    base: Mapping[str, Any]
    merged: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    hparams: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """One dialect. ``sniff`` looks at names and config only; ``read`` raises InputError; ``write`` TargetError.

    ``unwraps``: it takes a wrapper off and hands what is inside back to detection. ``example``: its self-test.
    """

    name: str
    about: str
    sniff: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, Given], Reading]
    write: Callable[[Adapter], Written] | None = None
    unwraps: bool = False
    example: Example | None = None


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
        from .table import custom

        return custom(Path(name))
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
            reading = candidate.read(plain(checkpoint, where), given)
            return _within(reading, given.prefix) if given.prefix else reading
    keys = ", ".join(list(checkpoint.tensors)[:4])
    raise InputError(
        f"{where} is not recognised as an adapter: {len(checkpoint.tensors)} tensors ({keys}{', …' if keys else ''}) "
        f"and no adapter_config.json beside them. Formats that can be read: {', '.join(sorted(formats()))}."
    )


def _within(reading: Reading, prefix: str) -> Reading:
    """The part of a reading that --prefix names. Raises UsageError where no adapted module is in it."""
    modules = [update.module for update in reading.adapter.updates]
    prefix = prefix.rstrip(".") + "."
    if modules and not any(module.startswith(prefix) for module in modules):
        raise UsageError(f"No adapted module begins with --prefix '{prefix}'; they are {', '.join(modules[:3])}, ….")
    return reading.within(prefix)
