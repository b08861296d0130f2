"""A format's own example, run: read, merged, and if it can be written, written, read and merged again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .adapter import Adapter
from .binding import bind
from .checkpoint import Checkpoint, Tensors, constant
from .errors import DoraToolsError, InputError, TargetError
from .formats import Example, Format, Given, Target, named

if TYPE_CHECKING:
    import torch

CLOSE = 1e-5  # of the largest merged number; float32, and numbers that a person typed


def check_table(name: str | None) -> bool:
    """Run the self-test of a user's table (``FILE.toml``), which is done before every use. False where there is none.

    Raises InputError with what differs, UsageError for an unknown name.
    """
    format = named(name) if name is not None and name.endswith(".toml") else None
    if name is None or format is None or format.example is None:
        return False
    try:
        check(format, format.example, name)
    except DoraToolsError as error:
        where = "" if "[test]" in str(error) else f"The [test] of {name}: "
        raise InputError(f"{where}{error}") from error
    return True


def check(format: Format, example: Example, name: str) -> None:
    """Raises InputError with the first number that is not as the example says."""
    where = f"The [test] of {name}"
    try:
        metadata = {"hyper_parameters": example.hparams, "adapter_config": example.config}
        tensors = Tensors(_held(example.tensors), metadata={k: v for k, v in metadata.items() if v})
        base = Tensors(_held(example.base)) if example.base else None
        expected = _held(example.merged)
        given = Given(**example.given, base=(lambda: base) if base else None)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{where}: {error}.") from error
    reading = format.read(tensors, given)
    home = base or reading.base
    if home is None:
        raise InputError(f"{where} needs a base: name → numbers, as the tensors bring none.")
    _compare(reading.adapter, home, expected, f"{where}:")
    if format.write is not None:
        try:
            written = format.write(reading.adapter, Target())
        except TargetError:
            return  # it holds more than the format can write
        config = {k: json.loads(v) for k, v in written.documents.items()}.get("adapter_config.json")
        again = Tensors(dict(_refs(written.tensors)), metadata={"adapter_config": config} if config else {})
        given = replace(given, alpha=None, scale_rule=None, scaling=None if config else 1.0)
        _compare(format.read(again, given).adapter, home, expected, f"{where}, written and read again:")


def _held(tensors: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    found = {name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()}
    odd = next((name for name, values in found.items() if not bool(values.isfinite().all())), None)
    if odd is not None:
        raise ValueError(f"{odd} holds NaN or Inf")
    return {name: constant(values, name) for name, values in found.items()}


def _refs(checkpoint: Checkpoint) -> Mapping[str, Any]:
    from .checkpoint import ref

    return {name: ref(checkpoint, name) for name in checkpoint.tensors}


def _compare(adapter: Adapter, base: Checkpoint, expected: Mapping[str, Any], where: str) -> None:
    from .merging import LazyTensors, Merged

    merged = LazyTensors(Merged(bind([(adapter, 1.0)], base), "cpu"), {})
    for name, promise in expected.items():
        if name not in merged:
            raise InputError(f"{where} the merged model has no {name}; it has {', '.join(list(merged)[:4])}.")
        wanted: torch.Tensor = promise.load().reshape(promise.shape)
        found = merged[name][...]
        if found.shape != wanted.shape:
            raise InputError(f"{where} {name} has shape {list(found.shape)}, expected {list(wanted.shape)}.")
        worst = float((found - wanted).abs().max())
        if not worst <= CLOSE * float(wanted.abs().max()):
            at = int((found - wanted).abs().argmax())
            raise InputError(
                f"{where} {name} has {float(found.flatten()[at]):g} where {float(wanted.flatten()[at]):g} is expected "
                f"(number {at}, row by row). Are scale rule, dims and the magnitude's axis right?"
            )
