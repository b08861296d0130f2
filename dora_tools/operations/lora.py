"""DoRA → LoRA: the best low-rank update of what the adapter really changes, with its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt

from ..adapter import Adapter, LowRank, Replacement
from ..binding import Binding, bind
from ..checkpoint import Checkpoint, constant
from ..deltas import Tokens
from ..errors import InputError, TargetError
from ..merging import Merged, dora_norms
from .finite import check_finite
from .outcome import Module, Outcome, by_module, measured, rank_of, refuse_parts
from .ranks import Ranks
from .subspace import Matrix, Progress, fits

_ENOUGH = 0.95  # of the energy: below that it must be meant


def to_lora(
    adapters: Sequence[tuple[Adapter, float]],
    base: Checkpoint,
    ranks: Ranks,
    *,
    force: bool = False,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Outcome:
    """The best plain LoRA of the true change W' − W that the adapters make together, each with its strength.

    Modules that are a plain LoRA stay as they are if only one adapter is given, with strength 1. Raises TargetError
    where less than 95 % of the energy is kept, unless ``force``; FitError where adapters and base do not fit.
    """
    for adapter, _ in adapters:
        check_finite(adapter, threads)
    binding = bind(adapters, base)
    alone = adapters[0][0] if len(adapters) == 1 and adapters[0][1] == 1.0 else None
    merged = Merged(binding, device)
    merged.prepare(threads)
    old = {u.module: u for adapter, _ in adapters for u in adapter.updates}
    doras = [u.module for u in old.values() if u.magnitude is not None]
    dense = [u.module for u in old.values() if not isinstance(u.delta, LowRank | Tokens)]
    todo = [module for module in old if alone is None or module in doras or module in dense]
    if not todo:
        plain = all(isinstance(u.delta, LowRank) for u in old.values())
        what = "the adapter is a plain LoRA already" if plain else "what is not rows of tokens is a plain LoRA already"
        raise InputError(f"No module has a magnitude: {what}.")
    rows = next((m for m in todo if isinstance(old[m].delta, Tokens)), None)
    if rows is not None:
        raise InputError(f"{rows} has rows replaced, which is no low-rank update to sum up.")
    places, turned = by_module(binding.bound), _turned(binding)
    refuse_parts(todo, places)
    matrices = [
        Matrix(u.module, places[u.module], u.kind, turned[u.module], u.kernel_size)
        for u in (old[module] for module in todo)
    ]
    ranks.check({m.module: m.shape(binding.base.tensors[m.name]) for m in matrices})
    dropped = _without_magnitude(alone, binding, device, threads) if alone is not None else {}
    made, totals = fits(
        binding.base, merged, matrices, ranks, device=device, threads=threads, seed=seed, progress=progress
    )
    lows = {m.module: replace(old[m.module], delta=made[m.module], magnitude=None) for m in matrices}
    first = adapters[0][0]
    biases = {
        f"{module}.bias": Replacement(constant(merged.read(name).reshape(-1).cpu(), name), shared=True)
        for module, name in _following(binding).items()
    }
    adapter = replace(
        first,
        updates=tuple(
            replace(u, bias=None) if f"{u.module}.bias" in biases else u
            for u in (lows.get(update.module, update) for update in old.values())
        ),
        replaced={**first.replaced, **biases},
    )
    modules = [
        Module(m.module, m.shape(binding.base.tensors[m.name]), rank_of(old[m.module]), rank_of(lows[m.module]),
               totals[m.module], dropped=dropped.get(m.module))
        for m in matrices
    ]  # fmt: skip
    outcome = Outcome("to-lora", adapter, tuple(measured(modules, adapter, base, merged, places, device, threads)))
    kept = outcome.total.kept if outcome.total is not None else None
    if kept is not None and kept < _ENOUGH and not force:
        lost = outcome.total.dropped if outcome.total is not None else None
        delta = outcome.total.delta if outcome.total is not None else None
        without = f" (leaving the magnitudes out would make an error of {lost / delta:.1%})" if lost and delta else ""
        raise TargetError(
            f"Only {kept:.1%} of the energy of the change is kept: the merged weight would be off by "
            f"{sqrt(1 - kept):.1%} of what the adapter changes{without}. A higher rank keeps more; --force takes it as "
            "it is. Without loss: merge the adapter; keep the full difference (LyCORIS .diff); or a LoRA with a scale "
            "for each output, where the server can apply one."
        )
    return outcome


def _turned(binding: Binding) -> dict[str, bool]:
    return {b.module: b.turned for name, bounds in binding.bound.items() for b in bounds if name.endswith("weight")}


def _following(binding: Binding) -> Mapping[str, str]:
    """Module → its bias, where the magnitude scales that too."""
    return {b.module: name for name, bounds in binding.bound.items() for b in bounds if b.follows is not None}


def _without_magnitude(adapter: Adapter, binding: Binding, device: str, threads: int) -> dict[str, float]:
    """‖W' − V‖ = ‖m − ‖V‖‖ of every DoRA module, in closed form: the error of leaving m out."""
    vectors = {u.module: u.magnitude.vector for u in adapter.updates if u.magnitude is not None}
    errors: dict[str, float] = {}
    for module, n in dora_norms(binding, threads, device):
        apart = vectors[module].load().double() - n.double().cpu()
        errors[module] = float(apart[n.cpu() > 0].norm())  # without direction W' is V, whatever m says
    return errors
