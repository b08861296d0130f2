"""Several adapters as one: exactly (ranks add up), truncated, or pruned and elected (TIES, DARE), on true deltas."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..adapter import Adapter, LowRank, Replacement, Update
from ..binding import bind
from ..checkpoint import Checkpoint, Ref, Tensors, blocks, constant, equal, single_threaded
from ..errors import FitError, InputError, UsageError
from ..lowrank import factors_of, svd_of_product
from ..merging import Merged
from ..names import places
from .finite import check_finite, check_parameters
from .lora import to_lora
from .outcome import Module, Outcome, by_module, rank_of, refuse_parts
from .ranks import Ranks, Spectrum
from .subspace import Matrix, fits

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
Weighted = tuple[Adapter, float]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Election:
    """How deltas are pruned and summed (PEFT's names, but on s·BA or W' − W, not on factors).

    ``density``: the part of a delta's entries that is kept; the largest (ties, magnitude_prune: Yadav et al., arXiv
    2306.01708) or random ones, the rest scaled up (dare: Yu et al., arXiv 2311.03099). ties then sums the entries that
    agree with the elected sign, divided by how many do.
    """

    method: str
    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS[1:]:
            raise UsageError(f"There is no method '{self.method}'; known are {', '.join(METHODS)}.")
        if not 0 < self.density <= 1:
            raise UsageError(f"density is a part of the whole, greater than 0 and at most 1, not {self.density!r}.")

    def combined(self, deltas: Sequence[torch.Tensor], weights: Sequence[float], name: str) -> torch.Tensor:
        """(out, in) of all, from (out, in) of each."""
        random = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        pruned = [self._pruned(delta, random) for delta in deltas]
        weighted = torch.stack([delta * w for delta, w in zip(pruned, weights, strict=True)])
        if not self.method.endswith("ties"):
            return weighted.sum(0)
        elected = torch.where(torch.stack(pruned).sum(0) >= 0, 1.0, -1.0)
        agree = torch.stack(pruned).sign() == elected
        return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)

    def _pruned(self, delta: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        if self.method.startswith("dare"):
            mask = torch.rand(delta.shape, generator=random) < self.density
            return delta * mask / self.density
        count = max(1, int(self.density * delta.numel()))
        flat = torch.zeros(delta.numel(), dtype=delta.dtype)
        largest = delta.flatten().abs().topk(count).indices
        flat[largest] = delta.flatten()[largest]
        return flat.view_as(delta)


def combine(
    adapters: Sequence[Weighted],
    ranks: Ranks | None = None,
    election: Election | None = None,
    *,
    base: Checkpoint | None = None,
    force: bool = False,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Outcome:
    """Σ wᵢ Δᵢ as one adapter. Without ``ranks`` exact: factors side by side, so that ranks add up.

    An update that only one adapter has, with weight 1, stays as it is, DoRA included. DoRA otherwise goes through its
    true change W' − W, with ``base`` and ``ranks``; so does what an ``election`` prunes. Raises UsageError for missing
    options, FitError where two adapters do not fit each other.
    """
    if not adapters:
        raise UsageError("There is no adapter to combine.")
    if election is not None and ranks is None:
        raise UsageError(f"What {election.method} leaves has full rank; say which rank or energy is wanted.")
    if election is not None and ranks is not None and ranks.parameters is not None:
        raise UsageError(f"{election.method} works module by module; say a rank or energy, not a budget for all.")
    for adapter, _ in adapters:
        check_finite(adapter, threads)
    sharing: dict[str, list[tuple[Update, float]]] = {}
    for adapter, weight in adapters:
        check_parameters(adapter)
        for update in adapter.updates:
            sharing.setdefault(update.module, []).append((update, weight))
    for module, sharers in sharing.items():
        kinds = {(u.kind, u.kernel_size, u.delta.shape) for u, _ in sharers}
        if len(kinds) > 1:
            raise FitError(f"{module} is {' and '.join(str(k) for k in kinds)} in the adapters: they do not fit.")
    alone = {m for m, s in sharing.items() if len(s) == 1 and s[0][1] == 1.0 and ranks is None and election is None}
    doras = {m for m, s in sharing.items() if m not in alone and any(u.magnitude is not None for u, _ in s)}
    for module, sharers in sharing.items():
        if module not in alone and module not in doras:
            for update, _ in sharers:
                _low(update)
    if doras and (base is None or ranks is None):
        raise UsageError(
            f"{min(doras)} is DoRA, which is no sum of its parts: it takes --base and a rank (or energy) for the best "
            "LoRA of what all make together. Merging them into the base with strengths is exact."
        )
    if base is not None:
        _check_places(adapters, base)
    replaced = _replaced(adapters, base)
    scaled = next((u.module for a, _ in adapters for u in a.updates if u.magnitude and u.magnitude.scales_bias), None)
    if election is not None and scaled is not None:
        raise UsageError(f"{scaled} scales its bias too, of which {election.method} would know nothing.")
    if election is not None:
        return _elected(adapters, sharing, ranks, election, base, replaced, device, threads, seed)
    if doras and base is not None and ranks is not None:
        own = [
            (replace(a, replaced={n: replaced[n] for n in a.replaced if n in replaced}), w)
            for a, w in adapters
            if a.updates or replaced.keys() & a.replaced.keys()
        ]
        outcome = to_lora(own, base, ranks, force=force, device=device, threads=threads, seed=seed, progress=progress)
        biased = {m: _bias(s) for m, s in sharing.items()}
        whole = outcome.adapter.replaced
        updates = tuple(
            replace(u, bias=None if f"{u.module}.bias" in whole else biased[u.module]) for u in outcome.adapter.updates
        )
        made = _whole(adapters, updates, {**replaced, **outcome.adapter.replaced})
        return replace(outcome, operation="combine", adapter=made)
    updates = tuple(s[0][0] if m in alone else _side_by_side(s) for m, s in sharing.items())
    modules = [Module(u.module, u.delta.shape, None, rank_of(u)) for u in updates]
    if ranks is not None:
        ranks.check({u.module: u.delta.shape for u in updates})
        updates, modules = _truncated(updates, ranks, threads)
    return Outcome("combine", _whole(adapters, updates, replaced), tuple(modules))


def _check_places(adapters: Sequence[Weighted], base: Checkpoint) -> None:
    """Two names for one weight of the base are one module to it, and two to a sum by names. Raises FitError."""
    names: dict[str, str] = {}
    for adapter, _ in adapters:
        for module, tensor in by_module(bind([(adapter, 1.0)], base).bound).items():
            if names.setdefault(tensor, module) != module:
                raise FitError(
                    f"{names[tensor]} and {module} of the adapters are both {tensor} in the base. Convert one of them "
                    "to the other's names, or merge both into the base."
                )


def _whole(adapters: Sequence[Weighted], updates: Sequence[Update], replaced: Mapping[str, Replacement]) -> Adapter:
    first = adapters[0][0]
    names = {a.base_model for a, _ in adapters if a.base_model}
    notes = [f"The adapters name several bases: {', '.join(sorted(names))}."] if len(names) > 1 else []
    named = first.base_model or next((a.base_model for a, _ in adapters if a.base_model), None)
    return replace(first, updates=tuple(updates), replaced=replaced, base_model=named, notes=(*first.notes, *notes))


def _replaced(adapters: Sequence[Weighted], base: Checkpoint | None) -> dict[str, Replacement]:
    """Tensors saved whole: of one adapter with weight 1, or the same in all; those that are the base's do not count."""
    found: dict[str, Replacement] = {}
    names = sorted({name for adapter, _ in adapters for name in adapter.replaced})
    own = places.found(base, names) if base is not None and names else {}
    for adapter, weight in adapters:
        for name, replacement in adapter.replaced.items():
            if name in own and equal(own[name], replacement.tensor):
                continue
            if weight != 1.0:
                raise FitError(
                    f"{name} was saved whole; a weight of {weight:g} takes no part of it. With "
                    "--base, what is as in the base does not count; merge --strength can take a part."
                )
            if not equal(found.setdefault(name, replacement).tensor, replacement.tensor):
                raise FitError(f"Two of the adapters bring {name} whole, with different values; only one can be kept.")
    return found


def _low(update: Update) -> LowRank:
    if not isinstance(update.delta, LowRank):
        raise InputError(f"{update.module} has no low-rank update to combine.")
    return update.delta


def _side_by_side(sharers: Sequence[tuple[Update, float]]) -> Update:
    """[c₁s₁B₁ c₂s₂B₂ …] [A₁; A₂; …]: the sum of the deltas, exactly, of scaling 1."""
    lows = [_low(update) for update, _ in sharers]
    scales = [low.scaling * w for low, (_, w) in zip(lows, sharers, strict=True)]
    first = sharers[0][0]
    rank = sum(low.rank for low in lows)
    out, in_ = lows[0].shape
    a = Ref((rank, in_), _kept([low.lora_A for low in lows]),
            lambda: torch.cat([low.lora_A.load() for low in lows]), lows[0].lora_A.key)  # fmt: skip
    factors = [low.lora_B.times(scale) for low, scale in zip(lows, scales, strict=True)]
    b = Ref((out, rank), _kept(factors), lambda: torch.cat([f.load() for f in factors], dim=1), lows[0].lora_B.key)
    return replace(first, delta=LowRank(a, b, 1.0, "1, combined"), bias=_bias(sharers))


def _kept(parts: Sequence[Ref]) -> str:
    types = {part.kept for part in parts}
    return types.pop() if len(types) == 1 else "F32"


def _bias(sharers: Sequence[tuple[Update, float]]) -> Ref | None:
    """The LoRA biases, which are added already scaled."""
    own = [(u.bias, w) for u, w in sharers if u.bias is not None]
    if not own:
        return None
    if len(own) == 1:
        return own[0][0] if own[0][1] == 1.0 else own[0][0].times(own[0][1])
    return constant(torch.stack([bias.load() * w for bias, w in own]).sum(0), own[0][0].key)


def _truncated(updates: Sequence[Update], ranks: Ranks, threads: int) -> tuple[tuple[Update, ...], list[Module]]:
    def svd(update: Update) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        single_threaded()
        low = _low(update)
        return svd_of_product(low.lora_A.load(), low.lora_B.load(), low.scaling)

    found = {u.module: triplets for u, triplets in blocks(updates, svd, threads)}
    spectra = {
        u.module: Spectrum(found[u.module][1].tolist(), float(found[u.module][1].square().sum()), u.delta.shape)
        for u in updates
    }
    chosen = ranks.choose(spectra)
    made, modules = [], []
    for update in updates:
        (u, values, vt), rank = found[update.module], min(chosen[update.module], *update.delta.shape)
        a, b = factors_of(u, values, vt, rank)
        low = LowRank(
            constant(a, f"{update.module}.lora_A"), constant(b, f"{update.module}.lora_B"), 1.0, "1, combined"
        )
        made.append(replace(update, delta=low))
        norm, error = float(values.square().sum().sqrt()), float(values[rank:].square().sum().sqrt())
        modules.append(Module(update.module, low.shape, rank_of(update), rank, norm, error))
    return tuple(made), modules


def _elected(
    adapters: Sequence[Weighted],
    sharing: Mapping[str, Sequence[tuple[Update, float]]],
    ranks: Ranks | None,
    election: Election,
    base: Checkpoint | None,
    replaced: Mapping[str, Replacement],
    device: str,
    threads: int,
    seed: int,
) -> Outcome:
    """Deltas pruned and elected entry by entry, one module in memory at a time, then the nearest LoRA."""
    assert ranks is not None
    sources = [(_Deltas(adapter, base, device, threads), weight) for adapter, weight in adapters]
    shapes = {module: sharers[0][0].delta.shape for module, sharers in sharing.items()}
    ranks.check(shapes)
    updates, modules = [], []
    for module, sharers in sharing.items():
        having = [(source, w) for source, w in sources if module in source.updates]
        total = election.combined([s.delta(module) for s, _ in having], [w for _, w in having], module)
        key = "delta"
        one = Tensors({key: constant(total, module)})
        zero = Tensors({key: constant(torch.zeros_like(total), module)})
        made, norms = fits(zero, one, [Matrix(module, key)], ranks, device=device, threads=1, seed=seed)
        low = made[module]
        a, b = low.lora_A.load().double(), low.lora_B.load().double()
        error = float((total.double() - b @ a).norm())
        updates.append(replace(sharers[0][0], delta=low, magnitude=None, bias=_bias(sharers)))
        modules.append(Module(module, shapes[module], None, low.rank, norms[module], error))
    return Outcome("combine", _whole(adapters, updates, replaced), tuple(modules))


class _Deltas:
    """s·BA of each module of an adapter, or of a DoRA W' − W, dense, (out, in)."""

    def __init__(self, adapter: Adapter, base: Checkpoint | None, device: str, threads: int) -> None:
        self.updates = {u.module: u for u in adapter.updates}
        self._merged: Merged | None = None
        if base is not None and adapter.is_dora:
            self._binding = bind([(adapter, 1.0)], base)
            self._merged = Merged(self._binding, device)
            self._merged.prepare(threads)
            self._places = by_module(self._binding.bound)
            refuse_parts((u.module for u in adapter.updates if u.magnitude is not None), self._places)
            self._turned = {b.module: b.turned for bs in self._binding.bound.values() for b in bs}

    def delta(self, module: str) -> torch.Tensor:
        update = self.updates[module]
        if update.magnitude is None or self._merged is None:
            low = _low(update)
            return low.lora_B.load() @ low.lora_A.load() * low.scaling
        name = self._places[module]
        change = self._merged.read(name).float().cpu() - self._binding.base.read(name).float()
        return change.T.contiguous() if self._turned[module] else change
