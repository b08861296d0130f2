"""Another rank, another alpha: the same update, or the nearest of that rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import frexp, ldexp, sqrt

import torch

from ..adapter import Adapter, LowRank, Update
from ..binding import Binding, Bound, bind
from ..checkpoint import Checkpoint, Ref, blocks, constant, single_threaded, tiles
from ..compare import distances
from ..dtypes import to_torch
from ..errors import FitError, InputError, UsageError
from ..lowrank import factors, factors_of, padded, svd_of_product
from ..merging import Merged, dora_norms
from .finite import check_finite, check_parameters
from .outcome import Module, Outcome, by_module, measured, refuse_parts
from .ranks import Ranks, Spectrum

Progress = Callable[[int], None]
_ROUNDS = {"F32": 24, "F16": 11, "BF16": 8}  # significant bits


@dataclass(frozen=True, slots=True)
class _Weights:
    """How much each row and column of a product counts: m / ‖V‖ of a DoRA along its axis."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def rescale(
    adapter: Adapter,
    ranks: Ranks | None = None,
    *,
    alpha: float | None = None,
    rslora: bool | None = None,
    dtype: str | None = None,
    base: Checkpoint | None = None,
    weighted: bool = False,
    refit: bool = False,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Change ranks, alpha or its rule. DoRA keeps its magnitudes, which preserves every norm of the merged weight.

    Lower ranks are the best approximation of s·BA (thin QR and a rank × rank SVD, float64), higher ones are padded with
    zeros. ``alpha``: lora_B takes what it changes. ``rslora``: which rule the written alpha follows; the update stays.
    ``dtype``: how factors are stored (default: as they were if that is exact, else F32). ``base``: errors of the merged
    weight; ``weighted`` truncates by them (DoRA's rows or columns count m/‖V‖ times); ``refit``: least-squares
    magnitudes. ``progress`` is called with bytes made.

    Raises UsageError for options that contradict each other, FitError for ranks that no module can have, InputError for
    NaN and Inf in the factors.
    """
    if (weighted or refit) and base is None:
        raise UsageError(f"{'--weighted' if weighted else '--refit'} needs --base.")
    if ranks is None and alpha is None and rslora is None and dtype is None:
        raise UsageError("Say what is to change: a rank, energy, ratio or parameters, alpha, rslora, or the dtype.")
    if alpha is not None and not 1e-15 < abs(alpha) < 1e15:
        raise UsageError(f"An alpha of {alpha:g} would erase the adapter or overflow.")
    check_finite(adapter, threads)
    check_parameters(adapter)
    if dtype is not None and dtype not in _ROUNDS:
        raise UsageError(f"Factors are stored as float32, float16 or bfloat16, not as {dtype}.")
    old = bind([(adapter, 1.0)], base) if base is not None else None
    if (weighted or refit) and not adapter.is_dora:
        raise UsageError("The adapter has no magnitudes that could be refitted or weigh anything: it is a plain LoRA.")
    low = {u.module: u.delta for u in adapter.updates if isinstance(u.delta, LowRank)}
    if not low:
        raise InputError("The adapter has no low-rank update whose rank or alpha could change.")
    if ranks is not None:
        ranks.check({module: delta.shape for module, delta in low.items()})
    if old is not None and (weighted or refit):
        refuse_parts((u.module for u in adapter.updates if u.magnitude is not None), by_module(old.bound))
    weights = _weights(adapter, base, device, threads) if weighted and base is not None else {}
    updates, modules = dict[str, Update](), list[Module]()
    chosen = _choose(low, ranks, weights, threads) if ranks is not None and ranks.parameters is not None else None

    def one(update: Update) -> tuple[Update, Module]:
        single_threaded()
        assert isinstance(update.delta, LowRank)
        delta, error, norm = update.delta, None, None
        if ranks is not None:
            delta, norm, error = _at_rank(update, ranks, chosen, weights.get(update.module, _Weights()))
        before = update.delta.rank
        return replace(update, delta=delta), Module(update.module, delta.shape, before, delta.rank, norm, error)

    todo = [u for u in adapter.updates if u.module in low]
    for update, (changed, module) in blocks(todo, one, threads):
        updates[update.module] = changed
        modules.append(module)
        if progress is not None:
            progress(4 * module.shape[0] * (module.rank or 0) + 4 * module.shape[1] * (module.rank or 0))
    order = {u.module: i for i, u in enumerate(adapter.updates)}
    modules.sort(key=lambda m: order[m.module])
    rule = rslora if rslora is not None else adapter.rslora
    made = replace(
        adapter,
        updates=tuple(_stored(updates.get(u.module, u), alpha, bool(rule), dtype) for u in adapter.updates),
        rslora=rule,
    )
    notes: tuple[str, ...] = ()
    if base is not None and old is not None:
        if refit:
            made = _refitted(made, old, bind([(made, 1.0)], base), device, threads)
        places, target = by_module(old.bound), Merged(old, device)
        change = distances(old.base, target, [places[m.module] for m in modules if m.module in places], threads, device)
        modules = [replace(m, delta=change[places[m.module]].difference) if m.module in places else m for m in modules]
        modules = measured(modules, made, base, target, places, device, threads)
        some = " of modules that are one tensor of it" * any(m.module not in places for m in modules)
        notes = (f"Errors{some} are those of the merged weight, against its change by the adapter.",)
    return Outcome("rescale", made, tuple(modules), notes)


def _loaded(delta: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return delta.lora_A.load(), delta.lora_B.load()


def _svd(delta: LowRank, weights: _Weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = _loaded(delta)
    return svd_of_product(a, b, delta.scaling, weights.rows, weights.columns)


def _choose(low: Mapping[str, LowRank], ranks: Ranks, weights: Mapping[str, _Weights], threads: int) -> dict[str, int]:
    """Ranks under a budget, which the spectra of all modules share."""

    def spectrum(item: tuple[str, LowRank]) -> Spectrum:
        single_threaded()
        values = _svd(item[1], weights.get(item[0], _Weights()))[1]
        return Spectrum(values.tolist(), float(values.square().sum()), item[1].shape)

    found = {module: s for (module, _), s in blocks(low.items(), spectrum, threads)}
    return ranks.choose({module: found[module] for module in low})


def _at_rank(
    update: Update, ranks: Ranks, chosen: Mapping[str, int] | None, weights: _Weights
) -> tuple[LowRank, float, float]:
    """The update at its new rank, ‖s·BA‖, and the norm of what is lost of it."""
    delta = update.delta
    assert isinstance(delta, LowRank)
    rank = chosen[update.module] if chosen is not None else ranks.rank and min(ranks.rank, *delta.shape)
    if rank is not None and rank >= delta.rank:
        a, b = _loaded(delta)
        norm = float(svd_of_product(a, b, delta.scaling)[1].square().sum().sqrt())
        if rank == delta.rank:
            return delta, norm, 0.0
        wide, tall = padded(a, b, rank)
        return replace(delta, lora_A=_as(wide, delta.lora_A), lora_B=_as(tall, delta.lora_B)), norm, 0.0
    u, values, vt = _svd(delta, weights)
    norm = float(values.square().sum().sqrt())
    if rank is None:
        rank = ranks.of(Spectrum(values.tolist(), norm**2, delta.shape)) or 1
        if rank >= delta.rank:
            return delta, norm, 0.0
    a, b = factors_of(u, values, vt, rank, weights.rows, weights.columns)
    source = f"1, in the factors (rank {delta.rank} → {rank})"
    made = LowRank(constant(a, delta.lora_A.key), constant(b, delta.lora_B.key), 1.0, source)
    return made, norm, float(values[rank:].square().sum().sqrt())


def _as(values: torch.Tensor, like: Ref) -> Ref:
    """In the stored type of another tensor, which holds these values exactly."""
    return replace(constant(values, like.key), dtype=like.kept)


def _stored(update: Update, alpha: float | None, rslora: bool, dtype: str | None) -> Update:
    """An update with the scaling that ``alpha`` gives, lora_B taking the difference, and factors of a stored type."""
    delta = update.delta
    if not isinstance(delta, LowRank):
        return update
    if alpha is not None:
        scaling = alpha / (sqrt(delta.rank) if rslora else delta.rank)
        source = f"{alpha:g}/{'√' * rslora}{delta.rank}, as asked for"
        delta = replace(delta, lora_B=delta.lora_B.times(delta.scaling / scaling), scaling=scaling, source=source)
    if dtype is not None:
        a, b = _balanced(*_loaded(delta), _ROUNDS[dtype])
        stored = [x.to(to_torch(dtype)) for x in (a, b)]
        for x, y in zip((a, b), stored, strict=True):
            lost = float((y.double() - x.double()).norm()) / (float(x.double().norm()) or 1.0)
            if not lost < 8 * 2.0 ** -_ROUNDS[dtype]:
                size = "too small" if bool(y.isfinite().all()) else "too large"
                raise FitError(f"{update.module}: its factors are {size} for {dtype}.")
        lora_A, lora_B = (constant(x, p.key) for x, p in zip(stored, (delta.lora_A, delta.lora_B), strict=True))
        delta = replace(delta, lora_A=lora_A, lora_B=lora_B)
    return replace(update, delta=delta)


def _balanced(a: torch.Tensor, b: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with factors of like size: a power of two from one to the other, which rounds nothing."""
    largest = [float(x.abs().max()) for x in (a, b)]
    if bits == 24 or 0.0 in largest:
        return a, b
    shift = (frexp(largest[0])[1] - frexp(largest[1])[1]) // 2
    return a * ldexp(1.0, -shift), b * ldexp(1.0, shift)


def _weights(adapter: Adapter, base: Checkpoint, device: str, threads: int) -> dict[str, _Weights]:
    """m / ‖V‖ of every DoRA module, by its rows or columns as the update has them."""
    binding = bind([(adapter, 1.0)], base)
    found: dict[str, _Weights] = {}
    own = {u.module: u.magnitude for u in adapter.updates if u.magnitude is not None}
    for module, n in dora_norms(binding, threads, device):
        m = own[module]
        ratio, _ = factors(m.vector.load().to(n), n, m.eps, m.eps_rule)
        ratio = ratio.abs().clamp_min(1e-12 * float(ratio.abs().max())).cpu()  # a row of m = 0 would divide by 0
        ratio = ratio if float(ratio.max()) else torch.ones_like(ratio)
        found[module] = _Weights(rows=ratio) if m.axis == "out" else _Weights(columns=ratio)
    return found


def _refitted(made: Adapter, old: Binding, new: Binding, device: str, threads: int) -> Adapter:
    """Magnitudes ⟨w', v_k⟩ / ‖v_k‖, with w' of the old adapter and v_k without magnitude of the new one."""
    before = Merged(old, device)
    bare = {n: tuple(replace(b, magnitude=None) for b in bounds) for n, bounds in new.bound.items()}
    after = Merged(replace(new, bound=bare), device)
    before.prepare(threads)
    placed = {b.module: (n, b) for n, bounds in new.bound.items() for b in bounds if b.magnitude is not None}

    def one(item: tuple[str, tuple[str, Bound]]) -> torch.Tensor:
        single_threaded()
        name, b = placed[item[0]]
        along_rows = b.magnitude is not None and b.magnitude.axis == "out"
        dots, squares = list[torch.Tensor](), list[torch.Tensor]()
        for first, last in tiles(before.tensors[name]):
            w, v = before.read(name, first, last).double(), after.read(name, first, last).double()
            dots.append((w * v).sum(1 if along_rows else 0))
            squares.append(v.square().sum(1 if along_rows else 0))
        total = torch.cat if along_rows else lambda parts: torch.stack(parts).sum(0)
        n = total(squares).sqrt()
        assert b.magnitude is not None
        eps, rule = b.magnitude.eps, b.magnitude.eps_rule
        divisor = n + eps if rule == "add" else n.clamp_min(eps)
        return torch.where(n > 0, total(dots) * divisor / n.square(), torch.zeros_like(n)).float().cpu()

    fitted = {module: vector for (module, _), vector in blocks(placed.items(), one, threads)}
    return replace(
        made,
        updates=tuple(
            replace(u, magnitude=replace(u.magnitude, vector=constant(fitted[u.module], u.magnitude.vector.key)))
            if u.magnitude is not None
            else u
            for u in made.updates
        ),
    )
