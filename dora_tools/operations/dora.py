"""LoRA → DoRA initialisation: the magnitudes under which the merged weight does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..adapter import Adapter, Axis, LowRank, Magnitude
from ..binding import bind
from ..checkpoint import Checkpoint, Ref, constant
from ..errors import InputError, UnsupportedError
from ..merging import dora_norms
from .finite import check_finite
from .outcome import Module, Outcome

Init = Literal["exact", "paper"]


def to_dora(
    adapter: Adapter,
    base: Checkpoint,
    axis: Axis = "out",
    init: Init = "exact",
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Every module with m = ‖W + s·BA‖ (float32) along ``axis``, so that m/‖V‖ = 1: the merge stays the LoRA's.

    ``init="paper"``: m = ‖W‖ as arXiv 2402.09353 starts from, which equals that only while lora_B is zero. The base is
    streamed once. Raises InputError for what is DoRA already, FitError where adapter and base do not fit.
    """
    done = next((u.module for u in adapter.updates if u.magnitude is not None), None)
    if done is not None:
        raise InputError(f"{done} has a magnitude: the adapter is DoRA already.")
    odd = next((u.module for u in adapter.updates if not isinstance(u.delta, LowRank)), None)
    if odd is not None or not adapter.updates:
        raise InputError(f"{odd or 'The adapter'} has no low-rank update, so there is nothing to make a DoRA of.")
    check_finite(adapter, threads)
    asked = tuple(replace(u, magnitude=Magnitude(_promised(u.delta.shape, axis), axis)) for u in adapter.updates)
    refuse_pieces(adapter, base)
    binding = bind([(replace(adapter, updates=asked), 1.0)], base)
    found = dict(dora_norms(binding, threads, device, progress, bare=init == "paper"))
    for module, vector in found.items():
        if not bool(vector.isfinite().all()):
            raise InputError(f"The base weight of {module} holds NaN or Inf, so its norms do.")
    updates = tuple(
        replace(u, magnitude=Magnitude(constant(found[u.module].float().cpu(), f"{u.module}.magnitude"), axis))
        for u in adapter.updates
    )
    notes: Sequence[str] = ()
    if init == "paper":
        notes = (
            "m = ‖W‖, not ‖W + s·BA‖: where lora_B is not zero the merged weight is another than the LoRA's. Use it to "
            "start a training, not to convert a trained adapter.",
        )
    made = replace(adapter, updates=updates)
    ranks = [u.delta.rank if isinstance(u.delta, LowRank) else None for u in updates]
    modules = [Module(u.module, u.delta.shape, r, r) for u, r in zip(updates, ranks, strict=True)]
    return Outcome("to-dora", made, tuple(modules), tuple(notes))


def refuse_pieces(adapter: Adapter, base: Checkpoint) -> None:
    """Raises UnsupportedError for a module that lies in several tensors of the base, each of which has norms."""
    bound = bind([(adapter, 1.0)], base).bound
    times = Counter(b.module for name, bounds in bound.items() if name.endswith("weight") for b in bounds)
    odd = next((module for module, count in times.items() if count > 1), None)
    if odd is not None:
        raise UnsupportedError(f"{odd} lies in several tensors of this base, and a magnitude is of one.")


def _promised(shape: tuple[int, int], axis: Axis) -> Ref:
    """A vector that nobody will load: binding wants its length and axis."""
    return Ref((shape[0 if axis == "out" else 1],), "F32", lambda: torch.empty(0), "the magnitude to be computed")
