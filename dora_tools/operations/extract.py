"""Two dense models → the nearest LoRA or DoRA between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from ..adapter import Adapter, Axis, Magnitude, Replacement, Unchanged, Update
from ..checkpoint import Checkpoint, TensorInfo, arranged, constant, ref, same
from ..compare import distances
from ..dtypes import DTYPES
from ..errors import FitError, InputError
from ..merging import Normed, norms
from ..names.places import Places
from ..names.ties import CONV1D_LAYERS, CONV1D_MODELS, EMBEDDING_NAME, TASK_HEADS, ties_of
from .outcome import Module, Outcome, measured
from .ranks import Ranks
from .subspace import Matrix, Progress, fits


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    ranks: Ranks,
    *,
    dora: bool = False,
    save_rest: bool = False,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    base_model: str | None = None,
    progress: Progress = lambda _: None,
) -> Outcome:
    """The nearest LoRA, or DoRA (m = ‖W'‖ of each output, exactly), that turns ``base`` into ``tuned``.

    Matrices of linear and conv layers that differ are fitted. Everything else that differs (norms, biases, embeddings,
    tensors that only the tuned model has) is refused by name with FitError, or with ``save_rest`` saved whole. Raises
    InputError for NaN and Inf.
    """
    ties = _ties(base)
    old, new = _completed(base, ties), _completed(tuned, ties)
    sides = {n: (i.rows, _flat(i)) for n, i in old.tensors.items() if _is_matrix(n, i)}
    if ranks.rank is not None:
        ranks.check(sides)
    changed, rest = _changes(base, old, new, ties, threads, progress)
    matrices = [_matrix(old, name, dora) for name in changed]
    if rest and not save_rest:
        more = f", and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise FitError(
            f"{min(rest)}{more} differ, and no low-rank update of a linear layer describes that. --save-rest keeps "
            "them whole, as modules_to_save."
        )
    if not matrices and not rest:
        raise FitError("The two models do not differ.")
    ranks.check({m.module: m.shape(old.tensors[m.name]) for m in matrices})
    magnitudes: dict[str, Magnitude] = {}
    candidates = [matrices]
    if dora:
        wanted = {m.module: Normed(m.name, m.scaled or "out", lambda: Unchanged((-1, -1))) for m in matrices}
        for module, n in norms(new, wanted, threads, device):
            magnitudes[module] = Magnitude(constant(n.float().cpu(), f"{module}.magnitude"), "out")
        candidates.append([replace(m, scaled=None) for m in matrices])  # where V is near W', its own scale is as good
    places = {m.module: m.name for m in matrices}
    apart = distances(old, new, places.values(), threads, device) if dora else {}
    tried: list[list[tuple[Update, Module]]] = []
    for each in candidates if matrices else []:
        made, totals = fits(old, new, each, ranks, device=device, threads=threads, seed=seed, progress=progress)
        updates = [
            Update(m.module, made[m.module], magnitudes.get(m.module), None, m.kind, m.kernel_size, m.turned or None)
            for m in each
        ]
        modules = [
            Module(m.module, m.shape(old.tensors[m.name]), None, made[m.module].rank,
                   apart[m.name].difference if dora else totals[m.module])
            for m in each
        ]  # fmt: skip
        found = measured(modules, Adapter(tuple(updates)), base, new, places, device, threads)
        tried.append(list(zip(updates, found, strict=True)))
    best = _nearest(tried, ranks.parameters is None)
    replaced = {name: Replacement(ref(new, name), shared) for name, shared in rest.items()}
    adapter = Adapter(tuple(update for update, _ in best), replaced, base_model, format="extracted")
    notes = [f"{len(rest)} tensors are saved whole."] if rest else []
    if dora and ranks.energy is not None:
        notes.append("The ranks keep that energy of the fit of V; what is kept of the change stands in the table.")
    return Outcome("extract", adapter, tuple(module for _, module in best), tuple(notes))


def _nearest(tried: list[list[tuple[Update, Module]]], by_module: bool) -> list[tuple[Update, Module]]:
    """Of several adapters the nearest one, or of each module the nearest update."""
    if not tried:
        return []
    if by_module:
        return [min(pairs, key=lambda pair: pair[1].error or 0.0) for pairs in zip(*tried, strict=True)]
    return min(tried, key=lambda pairs: sum((module.error or 0.0) ** 2 for _, module in pairs))


def _flat(info: TensorInfo) -> int:
    """The width of a conv weight as a matrix of (out, everything else)."""
    width = 1
    for n in info.shape[1:]:
        width *= n
    return width


def _matrix(base: Checkpoint, name: str, dora: bool) -> Matrix:
    """How a linear layer's weight is stored, by the architecture."""
    config = base.metadata.get("config") or {}
    module, info = name.removesuffix(".weight"), base.tensors[name]
    turned = config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LAYERS
    axis: Axis | None = None if not dora else "in" if turned else "out"
    if len(info.shape) > 2:
        return Matrix(module, name, "conv", False, info.shape[1:], axis)
    return Matrix(module, name, "linear", turned, (), axis)


def _ties(base: Checkpoint) -> Mapping[str, str]:
    """Tied name → what it is tied to, by the architecture, as the base spells them."""
    config = base.metadata.get("config") or {}
    named = config.get("architectures")
    ties = ties_of(named[0]) or {} if isinstance(named, list) and named and isinstance(named[0], str) else {}
    places = Places(base.tensors, config)
    return {places.own(tied): places.own(source) for tied, source in ties.items()}


def _completed(checkpoint: Checkpoint, ties: Mapping[str, str]) -> Checkpoint:
    """With both ends of every tie, of which files mostly hold one, and conv weights as matrices."""
    pairs = [*ties.items(), *((source, tied) for tied, source in ties.items())]
    known = checkpoint.tensors
    aliases = {new: old for new, old in pairs if new not in known and old in known}
    widths = {n: _flat(i) for n, i in known.items() if n.endswith(".weight") and len(i.shape) > 2}
    return arranged(checkpoint, aliases, widths)


def _changes(
    base: Checkpoint, old: Checkpoint, new: Checkpoint, ties: Mapping[str, str], threads: int, progress: Progress
) -> tuple[list[str], dict[str, bool]]:
    """Matrices that differ, and everything else that does, with whether it is the base's own parameter that changed.

    Raises FitError where the models are not of one kind.
    """
    config = base.metadata.get("config") or {}
    missing = [name for name in old.tensors if name not in new.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FitError(
            f"The tuned model has no {missing[0]}{more}, which the base has. Are they the same architecture?"
        )
    whole = [name for name in new.tensors if name not in old.tensors]
    foreign = next((name for name in whole if not TASK_HEADS & {*name.split(".")}), None)
    if foreign is not None:
        raise FitError(f"The base has no {foreign}, which the tuned model has. Are they the same architecture?")
    matrices: list[str] = []
    alike = [name for name, info in old.tensors.items() if new.tensors[name].shape == info.shape]
    for name in old.tensors.keys() - set(alike):
        was, now = old.tensors[name].shape, new.tensors[name].shape
        if was[1:] != now[1:] or was[:1] != (config.get("vocab_size"),):
            raise FitError(f"{name} has shape {list(was)} in the base and {list(now)} in the tuned model.")
        whole.append(name)
    floating = [n for n in alike if DTYPES[old.tensors[n].dtype].floating and DTYPES[new.tensors[n].dtype].floating]
    apart = distances(old, new, floating, threads, progress=progress)
    for name in floating:
        if not isfinite(apart[name].difference):
            raise InputError(f"{name} holds NaN or Inf in one of the models.")
        if apart[name].difference and _is_matrix(name, old.tensors[name]):
            matrices.append(name)
        elif apart[name].difference:
            whole.append(name)
    whole += [name for name in alike if name not in floating and not same(old, name, new, name)]
    together = set[str]()
    for tied, source in ties.items():
        if tied in old.tensors and {tied, source} & {*matrices, *whole}:
            one = config.get("tie_word_embeddings") is not False and same(old, tied, old, source)
            if one and same(new, tied, new, source):  # still one weight
                matrices = [name for name in matrices if name not in (tied, source)]
                whole = [name for name in whole if name not in (tied, source)]
                stored = source if source in base.tensors else tied
                together.add(stored)
    adapted = {name.removesuffix(".weight") for name in matrices}
    rest = dict.fromkeys(sorted(together), True)
    for name in whole:
        module = name.rpartition(".")[0]
        beside = [n for n in new.tensors if n.rpartition(".")[0] == module]
        large = any(len(new.tensors[n].shape) > 1 for n in beside if n not in whole)
        if not module or module in adapted or large:
            rest[name] = True  # the base's own parameter, in a layer that is not saved
        else:
            rest |= dict.fromkeys(beside, False)  # a module is saved with all that is in it
    return matrices, rest


def _is_matrix(name: str, info: TensorInfo) -> bool:
    """Whether it is the weight of a linear or conv layer."""
    named = name.endswith(".weight") and not any(EMBEDDING_NAME.search(part) for part in name.split("."))
    return named and len(info.shape) > 1 and min(info.rows, _flat(info)) > 1
