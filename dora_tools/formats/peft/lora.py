"""LoRA and DoRA of layers, with PEFT's variants of them: what a module's keys and the config make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter, Delta, Kind, LowRank, Magnitude, Update
from ...checkpoint import Checkpoint, Ref, assembled, computed, equal, ref
from ...deltas import Started
from ...errors import FitError, InputError, UnsupportedError
from ...names.places import Places
from .. import Given
from .config import PLAIN_STARTS, Patterns, start_of
from .keys import Keys, Module

if TYPE_CHECKING:
    import torch

LEAVES = {
    "lora_A",
    "lora_B",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_diag",
}
ONLY_TRAINING = {"lora_velora_embed", "lora_monteclora_sampler"}


@dataclass(frozen=True)
class Settings:
    """What scales a module's product, by the config and the user."""

    config: Mapping[str, Any]
    given: Given
    alpha: Patterns
    places: Places | None = None  # of the base

    def width(self, path: str) -> int | None:
        """How many inputs a layer has, if a base tells."""
        shape = self.places.shape(f"{path}.weight") if self.places is not None else None
        return shape[-1] if shape else None

    def scaling(self, name: str, rank: int) -> tuple[float, str]:
        """The number that BA is multiplied with, and where it comes from. Raises InputError for 0."""
        config, given, alpha = self.config, self.given, self.alpha[name]
        rslora = bool(config.get("use_rslora"))
        scaling = alpha / (sqrt(rank) if rslora else rank) if rank else 0.0
        source = f"{alpha:g}/√{rank} (rsLoRA)" if rslora else f"{alpha:g}/{rank}"
        if rank and (given.alpha is not None or given.scale_rule is not None):
            number = alpha if given.alpha is None else given.alpha
            rule = given.scale_rule or ("rslora" if rslora else "alpha/rank")
            numbers = {"alpha": number, "alpha/rank": number / rank, "rslora": number / sqrt(rank), "one": 1.0}
            scaling, source = numbers[rule], f"{rule} of {number:g}, as asked for"
        if given.scaling is not None:
            scaling, source = given.scaling, "--scaling"
        if not scaling and rank:
            raise InputError(
                f"{name}: adapter_config.json says lora_alpha = {alpha:g}, which would erase the adapter (some "
                "tools, verl for one, write 0 for 'unknown'). Put the alpha of the training there."
            )
        return scaling or 1.0, source


def factors(checkpoint: Checkpoint, module: Module) -> tuple[Ref, Ref, bool]:
    """lora_A, lora_B and whether they are an embedding's. Raises InputError where one is missing."""
    parts = module.parts
    embedding = any("embedding" in leaf for leaf in parts)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in parts:
            raise InputError(f"{module.path} has {', '.join(parts.values())}, but no {name}: the file is incomplete.")
    return ref(checkpoint, parts[names[0]]), ref(checkpoint, parts[names[1]]), embedding


def layer(checkpoint: Checkpoint, module: Module, settings: Settings, name: str = "", twice: bool = False) -> Update:
    """The update of one layer. ``name``: what the patterns know it by, if not by its path.

    ``twice``: PEFT applies it two times over (the out_proj of nn.MultiheadAttention).
    """
    config, path, parts = settings.config, module.path, module.parts
    a, b, embedding = factors(checkpoint, module)
    kernel_size: tuple[int, ...] = ()
    if len(a.shape) > 2 and 0 not in a.shape and 0 not in b.shape:
        kernel_size = a.shape[1:]
        if b.shape[1] != a.shape[0] or prod(b.shape[2:]) != 1:
            raise UnsupportedError(
                f"{path}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}: a grouped convolution, whose "
                "merge PEFT does not define."
            )
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    a, b = _whole(a, b, path, settings)
    rank = a.shape[0]
    scaling, source = settings.scaling(name or path, rank)
    if twice:
        scaling, source = 2 * scaling, f"twice {source}, as PEFT applies it"
    if ("lora_diag" in parts) != (start_of(config) == "kasa"):
        raise InputError(
            f"{path}: KaSA has a lora_diag in each module and a kasa_config in adapter_config.json, and here is one "
            "without the other."
        )
    if "lora_diag" in parts:
        a = _weighted(a, ref(checkpoint, parts["lora_diag"]))
    magnitude = (
        ref(checkpoint, parts["lora_magnitude_vector"]).reshape(-1) if "lora_magnitude_vector" in parts else None
    )
    kind: Kind = "embedding" if embedding else "conv" if kernel_size else "linear"
    delta = _started(LowRank(a, b, scaling, source), path, kind, settings)
    return Update(
        path,
        delta,
        Magnitude(magnitude, "out") if magnitude is not None else None,
        ref(checkpoint, parts["lora_B.bias"]).times(scaling) if "lora_B.bias" in parts else None,
        kind,
        kernel_size,
        bool(config["fan_in_fan_out"]) if "fan_in_fan_out" in config else None,
    )


def _whole(a: Ref, b: Ref, path: str, settings: Settings) -> tuple[Ref, Ref]:
    """The factors as they act: those that are stored by blocks (BD-LoRA) or for pooled inputs (QALoRA), in full."""
    config = settings.config
    blocks = config.get("use_bdlora")
    if isinstance(blocks, Mapping) and len(a.shape) == len(b.shape) == 2 and 0 not in (*a.shape, *b.shape):
        count = blocks.get("nblocks", 1)
        if not isinstance(count, int) or count < 1:
            raise InputError(f"adapter_config.json: use_bdlora has nblocks {count!r}, which is no number of blocks.")
        in_a, in_b = (
            any(isinstance(name, str) and name in path for name in _names(blocks, f"target_modules_bd_{x}"))
            for x in "ab"
        )
        if in_a and in_b:
            raise InputError(f"{path}: use_bdlora says that both lora_A and lora_B are block-diagonal.")
        if in_a:
            a = _diagonal(a, count)
        elif in_b:
            b = _diagonal(b, count)
    if config.get("use_qalora") and settings.width(path) != a.shape[-1]:  # which PEFT does for GPTQ layers only
        group = config.get("qalora_group_size", 16)
        if not isinstance(group, int) or group < 1:
            raise InputError(f"adapter_config.json: qalora_group_size must be a number of inputs, not {group!r}.")
        pools, stored = a.shape[-1], a
        # the mean of a group of inputs, times the number of groups
        a = computed((a.shape[0], pools * group), lambda v: v.repeat_interleave(group, 1) * (pools / group), stored)
    return a, b


def _names(blocks: Mapping[str, Any], option: str) -> list[Any]:
    found = blocks.get(option) or []
    if not isinstance(found, list):
        raise InputError(f"adapter_config.json: {option} of use_bdlora must be a list of names, not {found!r}.")
    return found


def _diagonal(factor: Ref, count: int) -> Ref:
    rows, width = factor.shape
    if rows % count:
        raise InputError(f"{factor.key} has {rows} rows, which are not {count} blocks (use_bdlora).")
    high = rows // count
    pieces = [(factor.rows(slice(i * high, (i + 1) * high)), i * high, i * width) for i in range(count)]
    return assembled((rows, width * count), pieces)


def _weighted(a: Ref, diagonal: Ref) -> Ref:
    if diagonal.shape != a.shape[:1]:
        raise InputError(f"{diagonal.key} has shape {list(diagonal.shape)}, and lora_A has {a.shape[0]} rows.")

    def weigh(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return values * weights.unsqueeze(1)

    return replace(computed(a.shape, weigh, a, diagonal), key=a.key)


def _started(low: LowRank, path: str, kind: str, settings: Settings) -> Delta:
    """The delta on the pristine base of factors that began as a part of it. Raises UnsupportedError where only the
    changed base or the factors as they began could tell.
    """
    start, given = start_of(settings.config), settings.given
    if start in PLAIN_STARTS or given.residual_base:
        return low
    if given.initial is not None and start not in ("loftq", "kasa"):
        return _less(low, path, given.initial(), bool(settings.config.get("use_dora")))
    if start in ("pissa", "olora", "kasa") and kind == "linear":
        return Started(low, start)  # type: ignore[arg-type]
    what = {
        "corda": "directions that its calibration data chose",
        "lora_ga": "directions that gradients chose",
        "loftq": "what quantisation lost",
    }.get(start, "a part of it that depends on random numbers" if "_niter_" in start else "a part of it")
    instead = (
        ""
        if start == "loftq"
        else ", or the adapter as it was before training with --initial-adapter (PEFT saves it, for "
        "path_initial_model_for_weight_conversion)"
    )
    raise UnsupportedError(
        f"init_lora_weights = '{start}' took {what} out of the base weights before training, so this adapter does not "
        f"fit the original base. Give the changed (residual) base with --base and say --residual-base{instead}."
    )


def start_note(config: Mapping[str, Any], given: Given) -> str:
    """What the user should know of how the factors began; "" where that left the base as it was."""
    start = start_of(config)
    if start in PLAIN_STARTS:
        if given.residual_base or given.initial is not None:
            return "The adapter began without a change of the base: --residual-base and --initial-adapter say nothing."
        return ""
    took = f"This adapter began with '{start}', which took a part of the base weights before training: "
    if given.residual_base:
        return took + "its factors are to be added to what was left of them (--residual-base)."
    if given.initial is not None:
        return took + "that part is the initial adapter's, and the base is taken to be the original."
    return (
        took
        + "it is computed again from the base, which must be the original one. For a base that is what was left, say "
        "--residual-base."
    )


def _less(low: LowRank, path: str, initial: Adapter, dora: bool) -> LowRank:
    """``BA − B₀A₀`` as one product, which is what PEFT's conversion to a plain LoRA writes."""
    first = next((u for u in initial.updates if u.module == path), None)
    began = first.delta if first is not None and (first.magnitude is not None) == dora else None
    if not isinstance(began, LowRank) or began.shape != low.shape:
        raise FitError(f"The initial adapter has no factors of {path}, or some of another shape: is it this adapter's?")
    if equal(began.lora_A, low.lora_A) and equal(began.lora_B, low.lora_B):
        raise FitError(
            f"{path}: the initial adapter has the factors of the trained one, so nothing would be left of it. Give the "
            "adapter as it was before training."
        )
    if began.scaling != low.scaling:
        raise FitError(
            f"{path}: the scaling is {low.scaling:g} ({low.source}), and that of the initial adapter {began.scaling:g}."
        )
    (out, in_), rank = low.shape, low.rank + began.rank
    a = assembled((rank, in_), [(low.lora_A, 0, 0), (began.lora_A, low.rank, 0)])
    b = assembled((out, rank), [(low.lora_B, 0, 0), (began.lora_B.times(-1.0), 0, low.rank)])
    return replace(low, lora_A=a, lora_B=b)


def check_magnitudes(config: Mapping[str, Any], updates: list[Update]) -> None:
    bare = [update.module for update in updates if update.magnitude is None]
    if config.get("use_dora") and bare:
        raise InputError(
            f"adapter_config.json says use_dora, but {len(bare)} of {len(updates)} modules have no "
            f"lora_magnitude_vector (first: {bare[0]}): a tool dropped the magnitudes, and merging without them would "
            "be another model. Get the original adapter; if it is a plain LoRA, set use_dora to false."
        )
    if not config.get("use_dora") and len(bare) < len(updates):
        raise InputError(
            f"{len(updates) - len(bare)} modules have a lora_magnitude_vector, but adapter_config.json does not say "
            "use_dora. If this was trained as DoRA, set use_dora to true there; if not, remove the magnitudes."
        )


def attentions(keys: Keys) -> set[str]:
    """Modules that are an nn.MultiheadAttention: PEFT keeps the factors of its out_proj inside its own."""
    return {m.within for m in keys.modules.values() if m.within is not None and m.path == f"{m.within}.out_proj"}
