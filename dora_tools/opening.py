"""Paths and hub ids → checkpoints, adapters, and what came with them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import containers, formats, hub
from .adapter import Adapter, LowRank
from .checkpoint import Checkpoint, plain
from .deltas import Started
from .errors import InputError, ResourceError, UnsupportedError, UsageError
from .formats import Given
from .names.gguf import settings
from .names.patterns import ADAPTER_KEY
from .selftest import check_table
from .templates import Unpacked

AdapterLike = Adapter | str | Path
if TYPE_CHECKING:
    from .merging import LazyTensors

    BaseLike = Checkpoint | LazyTensors | str | Path
else:
    BaseLike = Any


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The weights of a model or adapter (directory, file or hub id) as a Checkpoint. Raises InputError."""
    return containers.open_checkpoint(hub.resolve(path, "base"))


def read_adapter(path: str | Path, format: str | None = None, given: Given | None = None) -> Adapter:
    """An adapter from a directory, file or hub id. Raises InputError, UsageError.

    ``format`` overrides detection; ``given`` is what the file does not record (alpha, scale rule, magnitude axis).
    """
    return read(path, format, given)[0].adapter


def read(path: str | Path, format: str | None = None, given: Given | None = None) -> tuple[formats.Reading, Path]:
    place = adapter_home(hub.resolve(path, "adapter"))
    return formats.read(containers.open_checkpoint(place), str(path), format, given), place


def adapter_home(path: Path) -> Path:
    """``path``, or its one subdirectory that holds an adapter: PEFT saves those of another name than default there."""
    names = ("adapter_config.json", *containers.ADAPTER_FILES)
    if not path.is_dir() or any((path / name).exists() for name in names):
        return path
    inner = sorted(p.parent for p in path.glob("*/adapter_config.json"))
    if len(inner) > 1:
        raise InputError(f"{path} holds several adapters ({', '.join(p.name for p in inner)}); name one of them.")
    return inner[0] if inner else path


def initial(path: str | Path) -> Callable[[], Adapter]:
    """A reader of PEFT's adapter as it was before training, whose factors count as they stand."""
    return cache(lambda: read_adapter(path, "peft", Given(residual_base=True)))


def with_base(given: Given | None, base: BaseLike | None) -> Given:
    """``given`` with the base to ask, which is opened only if a reader does."""
    given = given or Given()
    return replace(given, base=cache(lambda: base_of(base))) if base is not None else given


def base_of(base: BaseLike) -> Checkpoint:
    """A base. Raises InputError for what is none: a training checkpoint that has an adapter in it."""
    if not isinstance(base, str | Path):
        base = getattr(base, "checkpoint", base)  # of dt.merged
        if not isinstance(base, Checkpoint):
            raise UsageError(f"A base is a path, a hub id or a checkpoint, not {type(base).__name__}.")
        return base
    checkpoint = plain(containers.open_checkpoint(hub.resolve(base, "base"), containers.BASE_FILES), str(base))
    if settings(checkpoint).get("general.type") == "adapter":
        raise InputError(f"{base} is a GGUF adapter; a base is a model's own weights.")
    mixed = next((name for name in checkpoint.tensors if ADAPTER_KEY.search(name)), None)
    if mixed is not None:
        raise InputError(
            f"{base} holds {mixed}: a training checkpoint with an adapter in it is no base. Give the original model, "
            "or leave --base out, to merge the checkpoint into its own weights."
        )
    return checkpoint


def hf_base(base: BaseLike) -> Checkpoint:
    """A base with HF names: of a GGUF one the matrices, dequantised."""
    checkpoint = base_of(base)
    return Unpacked(checkpoint) if "gguf" in checkpoint.metadata else checkpoint


def inputs_of(
    adapter: AdapterLike | Sequence[AdapterLike],
    strength: float | Sequence[float],
    format: str | None = None,
    given: Given | None = None,
) -> list[Input]:
    """Every adapter with its strength, and what came with it. Raises UsageError for numbers that do not fit."""
    many = [adapter] if isinstance(adapter, Adapter | str | Path) else list(adapter)
    strengths = strengths_of(strength, len(many), "adapters", "strengths")
    inputs = []
    for one, s in zip(many, strengths, strict=True):
        if isinstance(one, Adapter):
            inputs.append(Input(one, s))
        else:
            reading, place = read(one, format, given)
            inputs.append(Input(reading.adapter, s, str(one), place, reading.left_out, reading.base, reading.merged))
    return inputs


def strengths_of(given: float | Sequence[float], count: int, of: str, what: str) -> list[float]:
    """One number for each of ``count``. Raises UsageError."""
    found = [float(given)] * count if isinstance(given, int | float) else [float(s) for s in given]
    if not count:
        raise UsageError(f"There are no {of}.")
    if len(found) != count:
        raise UsageError(f"{count} {of}, but {len(found)} {what}: give one for each, or one for all.")
    odd = [s for s in found if not isfinite(s) or (s != 0 and not 1e-15 < abs(s) < 1e15)]
    if odd:
        raise UsageError(f"{what.capitalize()} must be finite numbers of a reasonable size, not {odd[0]:g}.")
    return found


def opened(
    adapters: Sequence[AdapterLike],
    base: BaseLike | None,
    format: str | None = None,
    given: Given | None = None,
    needed: bool = True,
) -> tuple[list[Adapter], Any]:
    """Adapters and the base they are of: the one given, or if it is ``needed`` the one that came with them or is named.

    The base is a Checkpoint, or None where none was given and none is ``needed``. Raises InputError, UsageError.
    """
    check_table(format)
    inputs = inputs_of(adapters, 1.0, format, with_base(given, base))
    found = [i.adapter for i in inputs]
    for update in (update for one in found for update in one.updates):
        if isinstance(update.delta, Started):
            raise UnsupportedError(
                f"{update.module}: the adapter began as a part of the base weights ({update.delta.start}), so its "
                "factors are not its change. Make a plain LoRA of it first, with convert --to peft --initial-adapter "
                "DIR, or merge it."
            )
    if base is not None or needed:
        _refuse_stacks(found)
    if base is not None or not needed:
        return found, None if base is None else hf_base(base)
    own, names = [i.base for i in inputs if i.base is not None], {a.base_model for a in found if a.base_model}
    if own:
        raise UsageError("The file holds its own base; give that with --base, as a model of its own, for now.")
    if len(names) != 1:
        raise UsageError("The adapter does not name its base model; give it with --base.")
    name = names.pop()
    try:
        return found, hf_base(name)
    except (InputError, ResourceError) as error:
        raise type(error)(f"{error} That is the base which the adapter names; say where it is with --base.") from error


def _refuse_stacks(adapters: Sequence[Adapter]) -> None:
    """Raises UnsupportedError for what an operation cannot measure in a base, module by module."""
    for adapter in adapters:
        expert = next((u.module for u in adapter.updates if u.kind == "expert"), None)
        tied = adapter.extra.get("peft", {}).get("ensure_weight_tying")
        if expert or tied:
            what = (
                f"{expert} is one of several experts in a tensor" if expert else "The adapter is of both ends of a tie"
            )
            raise UnsupportedError(
                f"{what}, which this operation cannot look at in the base. Without --base, "
                "rescale and combine take it; merge takes it with one."
            )


def left_out_notes(left_out: Mapping[str, str]) -> list[str]:
    """What was left out: by name, or where many are for one reason, how many."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    notes = []
    for why, names in reasons.items():
        if len(names) > 16:
            notes.append(f"left out {len(names)} tensors ({', '.join(names[:3])}, …): {why}")
        else:
            notes += [f"left out {name}: {why}" for name in names]
    return notes


def workers(threads: int | None) -> int:
    """Threads to work with: as many as asked for, or one for each core, at most 8."""
    return threads or min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Input:
    adapter: Adapter
    strength: float
    name: str = "(in memory)"
    place: Path | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: Checkpoint | None = None
    merged: bool | None = False

    def scaling(self) -> list[dict[str, Any]]:
        """Every scaling in the adapter, where it came from, and how many modules have it."""
        low = [update.delta for update in self.adapter.updates if isinstance(update.delta, LowRank)]
        counts = Counter((delta.scaling, delta.source) for delta in low)
        return [{"value": s, "source": source, "modules": n} for (s, source), n in counts.items()]

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files that the adapter was read from."""
        if self.place is None:
            return {}
        names = (*containers.ADAPTER_FILES, containers.TRAINED_BESIDE, "adapter_config.json")
        files = [self.place / n for n in names if (self.place / n).is_file()] if self.place.is_dir() else [self.place]
        return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
