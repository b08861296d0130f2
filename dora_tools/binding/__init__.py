"""Which base tensor each update and each replacement lands on, and what the config must say afterwards.

Works on names and shapes alone, so everything that does not fit is said before a byte is read or written. The result
is a *view* of the base (replacements laid over it, tied heads given a tensor of their own, conv weights as matrices)
and, for every tensor that changes, its updates turned the way the base stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapter import Adapter
from ..checkpoint import Checkpoint, arranged, overlay
from ..errors import FitError, UnsupportedError
from ..names.gguf import of_gguf
from ..names.pieces import unstacked
from ..names.replication import replicated
from .fitting import fit_labels, fit_vocabulary, orient, replacements
from .placing import place, refuse_mixtures
from .plan import Bound, Plan
from .tying import resolve_ties

__all__ = ["Binding", "Bound", "bind", "refuse_quantised"]


@dataclass(frozen=True)
class Binding:
    """The base as a view, the updates of each of its tensors, and the edited config (None: as it was).

    ``saved``: what the adapter brings whole, whether it replaces a tensor of the base or is added.
    """

    base: Checkpoint
    bound: Mapping[str, tuple[Bound, ...]]
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    saved: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def bind(adapters: Sequence[tuple[Adapter, float]], base: Checkpoint, untie: bool = False) -> Binding:
    """Place every update and replacement of the adapters, each with its strength. Raises FitError, TargetError.

    Onto a GGUF base the adapters are translated to its names and row orders first; ``untie`` lets a change of its
    embedding or head alone give the head a tensor of its own.
    """
    dialect = of_gguf(base) if "gguf" in base.metadata else None
    original = {} if dialect else base.metadata.get("config") or {}
    refuse_quantised(original)
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in original.items()}
    layers = {adapter.layers for adapter, _ in adapters}
    if len(layers) > 1:
        raise FitError("The adapters were trained on differently replicated layers (layer_replication).")
    base, notes = replicated(base, config, layers.pop()) if any(layers) else (base, [])
    plan = Plan(base, config, notes=notes)
    plan.dialect, plan.untie, plan.many = dialect, untie, len(adapters) > 1
    for number, (adapter, strength) in enumerate(adapters):
        place(dialect.adapter(unstacked(adapter)) if dialect else adapter, strength, plan, number)
    refuse_mixtures(plan)
    resolve_ties(plan)
    fit_vocabulary(plan)
    fit_labels(plan)
    added = tuple(name for name in (*plan.replaced, *plan.aliases) if name not in base.tensors)
    view = arranged(base, plan.aliases)
    view = overlay(view, replacements(plan, view))
    bound, widths = orient(plan, view)
    if widths:
        view = arranged(view, widths=widths)
    return Binding(
        view,
        bound,
        tuple(name for name in plan.replaced if name not in added),
        added,
        frozenset(plan.replaced),
        plan.config if plan.config != original else None,
        tuple(plan.notes),
    )


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a config.json that says its weights are quantised."""
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation
        raise UnsupportedError(
            f"The base is quantised ({method}); dora-tools merges into dense weights. Give the base it was made from, "
            "or a dequantised copy."
        )
