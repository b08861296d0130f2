"""What the readers of PEFT's other methods read from: a file's keys and config, checked, and the base's shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from ...adapter import Delta, Kind, LowRank, Update
from ...checkpoint import Checkpoint, Ref, ref, remembered
from ...deltas import Sized, multiplied
from ...dtypes import DTYPES
from ...errors import FitError, InputError, UnsupportedError
from ...names.places import found
from ...names.ties import CONV1D_LAYERS, CONV1D_MODELS
from .. import Given
from .config import Patterns, version_of
from .keys import Keys, Module


@dataclass(frozen=True)
class Source:
    """``used``: the keys that a method has asked for."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    keys: Keys
    given: Given
    notes: list[str]
    used: set[str] = field(default_factory=set)

    @property
    def modules(self) -> Iterator[Module]:
        """The adapted modules. Raises UnsupportedError for one that is adapted twice."""
        for module in self.keys.modules.values():
            if module.depth:
                raise UnsupportedError(f"{module.path} is adapted twice over ({next(iter(module.parts.values()))}).")
            yield module

    @property
    def version(self) -> tuple[int, ...] | None:
        return version_of(self.config, self.given.peft_version)

    # tensors

    def tensor(self, module: Module, leaf: str, *axes: str | int, integers: bool = False) -> Ref:
        """A module's tensor. ``axes``: the size of each, or a word for one that may be any. Raises InputError."""
        return self.checked(self._key(module, leaf), *axes, integers=integers)

    def shape(self, module: Module, leaf: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[self._key(module, leaf)].shape

    def _key(self, module: Module, leaf: str) -> str:
        if leaf not in module.parts:
            there = ", ".join(module.parts.values())
            raise InputError(f"{module.path} has {there}, but no {leaf}: the file is incomplete.")
        return module.parts[leaf]

    def checked(self, key: str, *axes: str | int, integers: bool = False) -> Ref:
        """A tensor of fractions (or ``integers``) with these axes. Raises InputError."""
        self.used.add(key)
        promise = ref(self.checkpoint, key)
        shape, kind = promise.shape, DTYPES[promise.dtype]
        sizes = zip(shape, axes, strict=False)
        if len(shape) != len(axes) or not all(s == a if isinstance(a, int) else s for s, a in sizes):
            expected = ", ".join(map(str, axes))
            raise InputError(f"{key} has shape {list(shape)}; expected [{expected}].")
        fractions = kind.floating or promise.dtype.startswith("F8")
        if fractions == integers:
            raise InputError(f"{key} is stored as {promise.dtype}; it holds {'integers' if integers else 'fractions'}.")
        return promise

    def shared(self, leaf: str, *axes: str | int) -> Ref | None:
        """A tensor of all modules, or None. Some versions save it once more in each module: those are left out."""
        copies = [(m.path, m.parts[leaf]) for m in self.keys.modules.values() if leaf in m.parts]
        key = self.keys.shared.get(leaf, copies[0][1] if copies else "")
        if not key:
            return None
        promise = self.checked(key, *axes)
        for path, other in copies:
            if other == key:
                continue
            shape = self.checked(other, *axes).shape
            if shape != promise.shape:
                raise InputError(
                    f"{other} has shape {list(shape)} and {key} {list(promise.shape)}, but one tensor is for all "
                    f"modules, so for {path} too."
                )
            self.keys.left_out[other] = f"a second copy of {key}"
        return remembered(promise)

    def product(self, module: Module, a: str, b: str) -> LowRank:
        """``a @ b`` of a module's matrices."""
        left = self.tensor(module, a, "out", "rank")
        return LowRank(self.tensor(module, b, left.shape[1], "in"), left, 1.0)

    def whole(self, module: Module, name: str) -> Ref:
        """A matrix that is stored as it is, or as the product of ``<name>_a`` and ``<name>_b``."""
        return (
            self.tensor(module, name, "out", "in")
            if name in module.parts
            else multiplied(self.product(module, f"{name}_a", f"{name}_b"))
        )

    # config

    def number(self, name: str, default: float | None = None) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e15:
            raise InputError(f"adapter_config.json: {name} must be a number, not {value!r}.")
        return value

    def count(self, name: str, least: int = 1, most: int = 1 << 20, default: int | None = None) -> int:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"adapter_config.json: {name} must be a whole number of {least} to {most}, not {value!r}.")
        return value

    def scaling(self, name: str, value: float, rank: int) -> tuple[float, str]:
        """``value / rank`` and where it comes from. Raises InputError for 0."""
        if not value:
            raise InputError(f"adapter_config.json says {name} = 0, which would erase the adapter.")
        return value / rank, f"{value:g}/{rank}"

    def flag(self, name: str, default: bool | None = False) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"adapter_config.json: {name} must be true or false, not {value!r}.")
        return value

    def choice(self, name: str, known: Collection[str]) -> str:
        value = self.config.get(name)
        if value not in known or not isinstance(value, str):
            raise InputError(f"adapter_config.json: {name} is {value!r}; known are {', '.join(known)}.")
        return value

    # the base

    @cached_property
    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the adapted weights as the base stores them, by module; none without a base."""
        if self.given.base is None:
            return {}
        names = [f"{module.path}.weight" for module in self.keys.modules.values()]
        return {name.removesuffix(".weight"): r.shape for name, r in found(self.given.base(), names).items()}

    def sizes(self, path: str) -> tuple[int, int] | None:
        """(out, in) of a linear layer of the base; None where the base is not given or does not have it."""
        if self.given.base is None or len(self.stored.get(path, ())) != 2:
            return None
        kind = (self.given.base().metadata.get("config") or {}).get("model_type")
        first, second = self.stored[path]
        turned = kind in CONV1D_MODELS and path.rpartition(".")[2] in CONV1D_LAYERS
        turned |= kind is None and self.config.get("fan_in_fan_out") is True
        return (second, first) if turned else (first, second)

    # updates

    def update(self, path: str, delta: Delta, kernel: tuple[int, ...] = ()) -> Update:
        """The update of a linear or conv layer. ``kernel``: (in, k, …), where the file tells; else the base does."""
        out, in_ = delta.shape
        shape = self.stored.get(path, ())
        if len(shape) > 2 and prod(shape[2:]) != 1 and out in (shape[0], -1) and in_ in (prod(shape[1:]), -1):
            kernel = shape[1:]
        kind: Kind = "conv" if kernel else "linear"
        turned = self.config.get("fan_in_fan_out")
        return Update(
            path, delta, kind=kind, kernel_size=kernel, transposed=turned if isinstance(turned, bool) else None
        )

    def sized(self, module: Module, make: Callable[[int, int], Delta], shape: tuple[int, int], numbers: int) -> Delta:
        """A delta whose sizes the base tells: made at once where that is certain, else when it is bound."""
        key, (out, in_), stored = next(iter(module.parts.values())), shape, self.stored.get(module.path, ())
        if len(stored) == 2 and (out in stored or in_ in stored):
            known = out if out in stored else in_
            other = stored[1] if stored[0] == known else stored[0]
            return make(out, other) if out == known else make(other, in_)
        return Sized(make, shape, numbers, key)


class Scales:
    """``alpha / r`` of each module, by rank_pattern and alpha_pattern: of LoHa and LoKr.

    Up to PEFT 0.14 the first pattern among both tables that matched decided both numbers; since then each table has its
    own first match. Of 0.14 to 0.17 the config does not tell which. ``unscaled``: LoKr up to 0.13.
    """

    def __init__(self, source: Source, unscaled: bool = False) -> None:
        self._source, self._unscaled = source, unscaled
        self._found: dict[str, tuple[float, float]] = {}  # r and alpha of the modules so far
        self._ranks = Patterns(source.config, "rank_pattern", "r", 8)
        self._alphas = Patterns(source.config, "alpha_pattern", "alpha", 8)
        tables = [source.config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        self._tables, self._default = tables, (source.config.get("r", 8), source.config.get("alpha", 8))
        self._patterns = list(dict.fromkeys(key for table in tables for key in table))
        numbers = {pattern: i for i, pattern in enumerate(self._patterns)}
        self._first = Patterns({"patterns": numbers}, "patterns", "", -1)
        version = source.version
        old = version < (0, 15) if version is not None else "exclude_modules" not in source.config
        self._ways = (True,) if old else (True, False) if version is None else (False,)

    def _by(self, jointly: bool, path: str) -> tuple[float, float]:
        """r and alpha."""
        if not jointly:
            return self._ranks[path], self._alphas[path]
        number = int(self._first[path])
        pattern = self._patterns[number] if number >= 0 else None
        r, alpha = (table.get(pattern, default) for table, default in zip(self._tables, self._default, strict=True))
        return r, alpha

    def scaling(self, path: str, stored: int | None) -> tuple[float, str]:
        """The number and where it comes from. ``stored``: the rank of the tensors, where they have one."""
        r, alpha = self._by(self._ways[-1], path)
        if len({self._by(jointly, path) for jointly in self._ways}) > 1:
            self._source.notes.append(
                f"{path}: patterns of rank_pattern and alpha_pattern overlap, and PEFT 0.14 read them otherwise than "
                f"later ones, as which alpha/r is {alpha:g}/{r:g} here. --peft-version 0.14.0 reads them as that did."
            )
        if stored and stored != r:
            self._source.notes.append(f"{path}: the config says r = {r:g}, the tensors have {stored}.")
        rank = stored or r
        self._found[path] = rank, rank if self._unscaled else alpha
        if self._unscaled:
            return 1.0, "PEFT up to 0.13"
        if not rank or not alpha:
            raise InputError(
                f"{path}: adapter_config.json says alpha = {alpha:g} and r = {r:g}, which would erase the adapter. Put "
                "those of the training there."
            )
        return alpha / rank, f"{alpha:g}/{rank:g}"

    def close(self) -> None:
        """After the last module: notes on the patterns, and for writing options that say the same to every PEFT."""
        paths, keys = list(self._found), self._source.keys
        if not self._ways[-1]:
            self._source.notes.extend(self._ranks.notes(paths) + self._alphas.notes(paths))
        if self._unscaled:
            self._source.notes.append("PEFT up to 0.13 trained this LoKr without alpha/r, as which it is merged.")
            keys.options["rank_dropout_scale"] = False
        if self._unscaled or (self._ways[-1] and self._patterns):
            for name, which in (("rank_pattern", 0), ("alpha_pattern", 1)):
                keys.options[name] = {f"^{re.escape(path)}": found[which] for path, found in self._found.items()}
            keys.options["exclude_modules"] = None


def fits(module: Module, found: tuple[int, int], expected: bool, what: str) -> None:
    """Raises FitError for a base weight (out, in) that is not as ``expected``."""
    if not expected:
        raise FitError(
            f"{module.path}: the base weight has {found[0]} outputs and {found[1]} inputs, but "
            f"{next(iter(module.parts.values()))} is for {what}. Is this the right base model?"
        )
