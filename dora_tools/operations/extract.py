"""Two dense models → the nearest LoRA or DoRA between them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapter import Adapter, Axis, Magnitude, Replacement, Update
from ..checkpoint import Checkpoint, TensorInfo, arranged, constant, ref, tiles
from ..compare import distances
from ..dtypes import DTYPES
from ..errors import FitError
from ..merging import Normed, norms
from ..names.ties import CONV1D_LAYERS, CONV1D_MODELS, may_be_tied, ties_of
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

    Matrices of linear layers that differ are fitted. Everything else that differs (norms, biases, embeddings, tensors
    that only one has) is refused by name with FitError, or with ``save_rest`` saved whole.
    """
    changed, rest = _changes(base, tuned, threads, progress)
    matrices = [_matrix(base, name, dora) for name in changed]
    if rest and not save_rest:
        more = f", and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise FitError(
            f"{rest[0]}{more} differ, and no low-rank update of a linear layer describes that. --save-rest keeps them "
            "whole, as modules_to_save."
        )
    if not matrices and not rest:
        raise FitError("The two models do not differ.")
    view = arranged(base, widths={m.name: base.tensors[m.name].nbytes and _flat(base.tensors[m.name]) for m in matrices
                                  if m.kind == "conv"})  # fmt: skip
    other = arranged(tuned, widths={m.name: _flat(tuned.tensors[m.name]) for m in matrices if m.kind == "conv"})
    made, totals = fits(view, other, matrices, ranks, device=device, threads=threads, seed=seed, progress=progress)
    found: dict[str, torch.Tensor] = {}
    if dora:
        wanted = {m.module: Normed(m.name, m.scaled or "out", lambda: _AsItIs()) for m in matrices}
        found = {module: n.float().cpu() for module, n in norms(other, wanted, threads, device)}
    updates = tuple(
        Update(
            m.module,
            made[m.module],
            Magnitude(constant(found[m.module], f"{m.module}.magnitude"), "out") if dora else None,
            None,
            m.kind,
            m.kernel_size,
            m.turned or None,
        )
        for m in matrices
    )
    replaced = {name: Replacement(ref(tuned, name), shared=False) for name in rest}
    adapter = Adapter(updates, replaced, base_model, format="extracted")
    modules = [Module(m.module, m.shape(view.tensors[m.name]), None, made[m.module].rank, totals[m.module])
               for m in matrices]  # fmt: skip
    places = {m.module: m.name for m in matrices}
    change = distances(view, other, places.values(), threads, device) if dora else {}
    modules = [replace(m, delta=change[places[m.module]].difference) if dora else m for m in modules]
    found_errors = measured(modules, replace(adapter, replaced={}), base, other, places, device, threads)
    notes = (f"{len(rest)} tensors are saved whole.",) if rest else ()
    return Outcome("extract", adapter, tuple(found_errors), notes)


class _AsItIs:
    def apply(self, w: torch.Tensor, start: int) -> None:
        """V = W."""


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


def _changes(base: Checkpoint, tuned: Checkpoint, threads: int, progress: Progress) -> tuple[list[str], list[str]]:
    """Matrices that differ, and everything else that does. Raises FitError where the models are not of one kind."""
    config = base.metadata.get("config") or {}
    named = config.get("architectures")
    ties = ties_of(named[0]) if isinstance(named, list) and named and isinstance(named[0], str) else {}
    tied = {name for pair in (ties or {}).items() for name in pair}
    missing = [name for name in base.tensors if name not in tuned.tensors and name not in tied]
    if missing:
        raise FitError(
            f"The tuned model has no {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which "
            "the base has. Are they the same architecture?"
        )
    rest = [name for name in tuned.tensors if name not in base.tensors and name not in tied]
    for name in tuned.tensors:
        if name in tied and name not in base.tensors:
            source = next((n for pair in (ties or {}).items() if name in pair for n in pair if n in base.tensors), None)
            if source is None or not _same(base, source, tuned, name):
                rest.append(name)
    alike = [n for n, i in base.tensors.items() if n in tuned.tensors and tuned.tensors[n].shape == i.shape]
    rest += [n for n in base.tensors if n in tuned.tensors and n not in alike]
    floating = [n for n in alike if DTYPES[base.tensors[n].dtype].floating and DTYPES[tuned.tensors[n].dtype].floating]
    apart = distances(base, tuned, floating, threads, progress=progress)
    differ = [n for n in floating if apart[n].difference > 0]
    vocabulary = config.get("vocab_size")
    changed = []
    for name in differ:
        shape = base.tensors[name].shape
        embedding = (
            may_be_tied(name) and (name in tied or shape[:1] == (vocabulary,)) and not name.startswith("lm_head")
        )
        if (
            name.endswith(".weight")
            and len(shape) >= 2
            and not embedding
            and min(shape[0], _flat(base.tensors[name])) > 1
        ):
            changed.append(name)
        else:
            rest.append(name)
    whole = [n for n in alike if n not in floating and not _same(base, n, tuned, n)]
    return changed, [*rest, *whole]


def _same(a: Checkpoint, name: str, b: Checkpoint, other: str) -> bool:
    if a.tensors[name].shape != b.tensors[other].shape:
        return False
    return all(bool((a.read(name, *rows) == b.read(other, *rows)).all()) for rows in tiles(a.tensors[name]))
