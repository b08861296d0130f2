"""Adapter formats: a checkpoint with its config ⇄ an Adapter. One module or table per format; none imports another.

A format is a module of this package that defines ``FORMAT``, or a table in ``tables/*.toml`` (see ``table``). Dropping
the file in is all: detection, the choices of the command line and the tests of all formats find it. Other packages
register a ``Format`` under the entry point ``dora_tools.formats``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from math import isfinite
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
    mode of layers that merge themselves on eval. ``fan_in_fan_out``: square weights are stored (in, out). ``prefix``:
    what stands before the adapted network's names. ``base`` opens the base, for what only its shapes tell. ``inside``:
    the format inside a wrapper.

    Of PEFT's adapters: ``peft_version`` wrote it; ``lora_b_layout``, the order of lora_B's columns for experts;
    ``expert_lora_a``, which axis of their matrices lora_A is of, where those are square;
    ``mha_out_proj``, how often its update counts; ``residual_base``, the base is the one that the training changed
    first (PiSSA, LoftQ …); ``initial``, the adapter as it was before training.
    """

    alpha: float | None = None
    scaling: float | None = None
    scale_rule: str | None = None
    magnitude_axis: Axis | None = None
    enable_lora: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    saved_in: Literal["train", "eval"] | None = None
    fan_in_fan_out: bool | None = None
    prefix: str = ""
    base: Callable[[], Checkpoint] | None = None
    inside: str | None = None
    peft_version: str | None = None
    lora_b_layout: str | None = None
    expert_lora_a: Literal["first", "last"] | None = None
    mha_out_proj: Literal["once", "twice"] | None = None
    residual_base: bool = False
    initial: Callable[[], Adapter] | None = None

    def __post_init__(self) -> None:
        if self.scale_rule not in (None, *SCALE_RULES):
            raise UsageError(f"There is no scale rule '{self.scale_rule}'; known are {', '.join(SCALE_RULES)}.")
        if self.scaling is not None and (self.alpha is not None or self.scale_rule is not None):
            raise UsageError(
                "--scaling is the number that is multiplied; it leaves nothing for --alpha or --scale-rule."
            )
        for name, value in (("--alpha", self.alpha), ("--scaling", self.scaling)):
            if value is not None and not (isfinite(value) and 1e-30 < abs(value) < 1e30):
                raise UsageError(f"{name} {value:g} would erase the adapter or overflow.")
        if self.alpha is not None and self.alpha < 0:
            raise UsageError(f"--alpha is a positive number, not {self.alpha:g}.")


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

    def within(self, prefix: str, beside: Collection[str] = ()) -> Reading:
        """The network whose names begin with ``prefix``, without it. Others, but for ``beside``, are left out."""
        adapter, base = self.adapter, self.base
        names = [*adapter.replaced, *(base.tensors if base else ()), *(u.module + "." for u in adapter.updates)]
        out = [name for name in names if not name.startswith(prefix) and name not in beside]
        outside = {n.rstrip("."): f"not in the adapted network ({prefix}…)" for n in out}
        updates = tuple(replace(u, module=u.module.removeprefix(prefix)) for u in adapter.updates
                        if u.module.startswith(prefix))  # fmt: skip
        inner = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix) or n in beside}
        replaced = {inner[n]: r for n, r in adapter.replaced.items() if n in inner}
        if base is not None:
            inside = [name for name in base.tensors if name in inner]
            base = View(
                {inner[name]: (base, name) for name in inside},
                {inner[name]: base.tensors[name] for name in inside},
                base.metadata,
            )
        note = f"The network is the checkpoint's '{prefix}…'; its names are given without that."
        named = replace(adapter, updates=updates, replaced=replaced, notes=(*adapter.notes, note))
        return replace(self, adapter=named, left_out={**self.left_out, **outside}, base=base)


@dataclass(frozen=True, slots=True)
class Target:
    """The model that an adapter is written for, where a format depends on it: its GGUF architecture, and itself.

    ``fold_scaling``: for readers that know one rank and one scaling only.
    """

    architecture: str | None = None
    base: Callable[[], Checkpoint] | None = None
    fold_scaling: bool = False


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
    ``for_model``: what it writes fits one model only, which must be known.
    """

    name: str
    about: str
    sniff: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint, Given], Reading]
    write: Callable[[Adapter, Target], Written] | None = None
    unwraps: bool = False
    example: Example | None = None
    for_model: bool = False


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
    inside, outside = _inside(checkpoint, given.prefix)
    for candidate in formats().values() if chosen is None else (chosen,):
        if chosen is not None or candidate.sniff(inside):
            reading = candidate.read(plain(inside, where), given)
            reading = replace(reading, left_out={**reading.left_out, **outside})
            return _within(reading, given.prefix) if given.prefix and not outside else reading
    keys = ", ".join(list(checkpoint.tensors)[:4])
    raise InputError(
        f"{where} is not recognised as an adapter: {len(checkpoint.tensors)} tensors ({keys}{', …' if keys else ''}) "
        f"and no adapter_config.json beside them. Formats that can be read: {', '.join(sorted(formats()))}. "
        "For another one, inspect --suggest-format begins a table of your own (--custom)."
    )


def _inside(checkpoint: Checkpoint, prefix: str) -> tuple[Checkpoint, dict[str, str]]:
    """The tensors whose names begin with the prefix, without it, and why the others are left out; or all of them."""
    prefix = prefix.rstrip(".") + "."
    names = [name for name in checkpoint.tensors if name.startswith(prefix)]
    if not names:
        return checkpoint, {}
    tensors = {name.removeprefix(prefix): checkpoint.tensors[name] for name in names}
    attributes = checkpoint.metadata.get("attributes", {})
    metadata = {
        **checkpoint.metadata,
        "attributes": {k.removeprefix(prefix): v for k, v in attributes.items() if k.startswith(prefix)},
    }
    view = View({name.removeprefix(prefix): (checkpoint, name) for name in names}, tensors, metadata)
    outside = {n: f"not in the adapted network ({prefix}…)" for n in checkpoint.tensors if not n.startswith(prefix)}
    return view, outside


def _within(reading: Reading, prefix: str) -> Reading:
    """The part of a reading that --prefix names. Raises UsageError where no adapted module is in it."""
    modules = [update.module for update in reading.adapter.updates]
    prefix = prefix.rstrip(".") + "."
    if modules and not any(module.startswith(prefix) for module in modules):
        raise UsageError(f"No adapted module begins with --prefix '{prefix}'; they are {', '.join(modules[:3])}, ….")
    return reading.within(prefix)
