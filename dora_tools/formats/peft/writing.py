"""Writing PEFT's directory: what the newest PEFT loads without a missing or an unexpected key."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from ...adapter import Adapter, LowRank, Update
from ...checkpoint import Ref, Tensors, assembled, computed, constant
from ...deltas import Started, Tokens
from ...errors import TargetError
from ...names.pieces import expert_of
from .. import Target, Written
from .config import PLAIN_STARTS, Patterns
from .experts import ORDER, targeted
from .keys import saved_whole

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Entry:
    """The factors of one module as PEFT has them: ``name`` is how its patterns know it, ``key`` where they stand."""

    name: str
    key: str
    low: LowRank
    update: Update
    parameter: str = ""  # of target_parameters


def write(adapter: Adapter, target: Target) -> Written:
    """PEFT's directory. Raises TargetError for what it cannot hold: an in-axis magnitude, a delta of another kind.

    An adapter of another method than LoRA is written as it was read, if it is still the same.
    """
    old: Mapping[str, Any] = adapter.extra.get("peft", {})
    kept = adapter.extra.get("peft_updates", ())
    same = len(kept) == len(adapter.updates) and all(a is b for a, b in zip(kept, adapter.updates, strict=True))
    low = all(isinstance(u.delta, LowRank | Started | Tokens) for u in adapter.updates)
    other = old.get("peft_type", "LORA") != "LORA"
    if same and (other or not low) and not target.fold_scaling:
        return _as_it_was(adapter, old)
    if other:  # its options are not LoRA's
        old = {name: old[name] for name in ("task_type", "modules_to_save", "revision") if name in old}
    if target.fold_scaling:
        adapter = _folded(adapter)
    _check(adapter)
    entries = _entries(adapter, old)
    refs: dict[str, Ref] = {}
    for entry in entries:
        _put(refs, entry)
    for update in adapter.updates:
        if isinstance(update.delta, Tokens):
            refs[f"{_PREFIX}{update.module}.token_adapter.trainable_tokens_delta"] = update.delta.tensor
    refs |= _replaced(adapter)
    config = _config(adapter, old, entries)
    return _written(refs, config)


def _written(refs: Mapping[str, Ref], config: Mapping[str, Any]) -> Written:
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    return Written(Tensors(refs), "adapter_model.safetensors", {"adapter_config.json": text})


def _as_it_was(adapter: Adapter, old: Mapping[str, Any]) -> Written:
    refs: dict[str, Ref] = {}
    for key, tensor in adapter.extra["peft_tensors"].items():
        refs[key if key.startswith("base_model.") else _PREFIX + key] = tensor
    held = {tensor.key for tensor in refs.values()}
    refs |= {key: tensor for key, tensor in _replaced(adapter).items() if tensor.key not in held}
    return _written(refs, {**old, "base_model_name_or_path": adapter.base_model})


def _replaced(adapter: Adapter) -> dict[str, Ref]:
    targets = {update.module: "base_layer." for update in adapter.updates}
    targets |= {u.module: "token_adapter.base_layer." for u in adapter.updates if isinstance(u.delta, Tokens)}
    refs = {}
    for name, replacement in adapter.replaced.items():
        module, _, parameter = name.rpartition(".")
        refs[f"{_PREFIX}{module}.{targets.get(module, '')}{parameter}"] = replacement.tensor
    return refs


def _attentions(adapter: Adapter) -> set[str]:
    """The modules that are an nn.MultiheadAttention."""
    return {u.module for u in adapter.updates if u.parameter == "in_proj_weight"}


def _check(adapter: Adapter) -> None:
    attentions = _attentions(adapter)
    layers = [u for u in adapter.updates if u.kind not in ("whole", "expert")]
    bare = [update.module for update in layers if update.magnitude is None]
    if adapter.is_dora and bare:
        raise TargetError(
            f"{bare[0]} has no magnitude and other modules have: PEFT's use_dora is for all. to-dora can give the LoRA "
            "modules theirs; a dense merge keeps both kinds."
        )
    starts = {u.delta.start if isinstance(u.delta, Started) else None for u in layers}
    if len(starts) > 1:
        raise TargetError(
            "Some modules began as a part of their base weight (PiSSA, OLoRA or KaSA) and others did not; PEFT's init "
            "is for all. A dense merge keeps both kinds."
        )
    for update in adapter.updates:
        if not isinstance(update.delta, LowRank | Started | Tokens):
            raise TargetError(f"{update.module}: PEFT's LoRA holds low-rank updates only; merge the adapter instead.")
        of_bare = update.parameter != "weight" or "weight" in targeted(update.module, adapter.extra.get("peft", {}))
        if update.magnitude and (of_bare or update.kind == "expert" or update.module.rpartition(".")[0] in attentions):
            raise TargetError(
                f"{update.module}: PEFT has no DoRA of bare parameters or nn.MultiheadAttention; merge it."
            )
        if adapter.is_dora and update.bias is not None:
            raise TargetError(
                f"{update.module} has a LoRA bias, which PEFT does not allow beside DoRA. A dense merge keeps both."
            )
        if update.magnitude and (update.magnitude.eps or update.magnitude.scales_bias):
            raise TargetError(
                f"{update.module}: this DoRA has an eps in its norm or scales the bias, which PEFT's does not. A dense "
                "merge keeps it exactly."
            )
        if update.magnitude and update.magnitude.axis == "in":
            raise TargetError(
                f"{update.module}: PEFT's DoRA has one magnitude per output, this one has one per input. A dense merge "
                "keeps it exactly."
            )
        if update.part is not None:
            raise TargetError(f"{update.module}: an update of a part of a tensor has no place in PEFT's files.")


def _entries(adapter: Adapter, old: Mapping[str, Any]) -> list[_Entry]:
    attentions = _attentions(adapter)
    nested: dict[str, dict[str, list[Update]]] = {}
    entries = []
    for update in adapter.updates:
        low = update.delta.delta if isinstance(update.delta, Started) else update.delta
        if not isinstance(low, LowRank):
            continue
        owner, _, last = update.module.rpartition(".")
        if update.kind == "expert":
            path, _, parameter = expert_of(update)[0].rpartition(".")
            nested.setdefault(path, {}).setdefault(parameter, []).append(update)
        elif update.parameter not in ("weight", "in_proj_weight"):
            nested.setdefault(update.module, {})[update.parameter] = [update]
        elif owner in attentions and last == "out_proj":  # PEFT applies these factors twice
            whole = next(u.delta for u in adapter.updates if u.name == f"{owner}.in_proj_weight")
            if not isinstance(whole, LowRank) or whole.rank != low.rank:
                raise TargetError(
                    f"{update.module}: PEFT gives it the rank of its nn.MultiheadAttention, and here they differ. "
                    "Give one --rank, or merge the adapter."
                )
            b = low.lora_B.times(low.scaling / 2 / whole.scaling) if low.scaling != 2 * whole.scaling else low.lora_B
            shared = replace(low, lora_B=b, scaling=whole.scaling)
            entries.append(_Entry(owner, f"{owner}.base_layer.out_proj", shared, update))
        elif targeted(update.module, old) == ["weight"]:
            entries.append(_Entry(update.name, update.module, low, update, "weight"))
        else:
            entries.append(_Entry(update.module, update.module, low, update))
    for path, parameters in nested.items():
        order = adapter.extra.get("peft_parameters", {}).get(path, ())
        if not parameters.keys() <= {*order}:
            order = ORDER
        innermost_first = sorted(parameters, key=lambda p: order.index(p) if p in order else len(order))
        for depth, parameter in enumerate(reversed(innermost_first)):
            updates = parameters[parameter]
            low = updates[0].delta if updates[0].kind != "expert" else _stacked(f"{path}.{parameter}", updates)
            assert isinstance(low, LowRank)
            entries.append(_Entry(f"{path}.{parameter}", path + ".base_layer" * depth, low, updates[0], parameter))
    return entries


def _stacked(name: str, updates: Sequence[Update]) -> LowRank:
    """The factors of all experts as PEFT stacks them: lora_A expert by expert, lora_B with the expert running fastest.

    The rank is that of one expert, while lora_A has as many rows as all of them.
    """
    numbers = {int(u.module.split(".")[-2]): u.delta for u in updates}
    lows = [low for e in range(len(numbers)) if isinstance(low := numbers.get(e), LowRank)]
    if len(lows) < len(updates):
        raise TargetError(f"{name}: PEFT adapts all experts of a parameter or none, and only some are adapted here.")
    if len({low.scaling for low in lows}) > 1 or len({low.rank for low in lows}) > 1:
        raise TargetError(
            f"{name}: PEFT has one rank and scaling for all experts of a parameter, and here they differ. Give one "
            "--rank, or merge the adapter."
        )
    (out, in_), rank, count = lows[0].shape, lows[0].rank, len(lows)
    a = assembled((count * rank, in_), [(low.lora_A, e * rank, 0) for e, low in enumerate(lows)])

    def interleave(*factors: Any) -> Any:
        first = factors[0]
        whole = first.new_empty(out, rank, count)
        for e, factor in enumerate(factors):
            whole[:, :, e] = factor
        return whole.reshape(out, rank * count)

    b = computed((out, rank * count), interleave, *(low.lora_B for low in lows))
    kept = lows[0].lora_B.kept if len({low.lora_B.kept for low in lows}) == 1 else "F32"
    return _Stack(a, replace(b, dtype=kept), lows[0].scaling, lows[0].source, rank)


@dataclass(frozen=True, slots=True)
class _Stack(LowRank):
    """Factors of several experts; ``each``: the rank of one."""

    each: int = 0

    @property
    def rank(self) -> int:
        return self.each


def _put(refs: dict[str, Ref], entry: _Entry) -> None:
    update, here = entry.update, f"{_PREFIX}{entry.key}."
    a, b, m = entry.low.lora_A, entry.low.lora_B, update.magnitude.vector if update.magnitude else None
    if update.kind == "embedding":
        refs[here + "lora_embedding_A"], refs[here + "lora_embedding_B"] = a, b
    else:
        ones = (1,) * (len(update.kernel_size) - 1)
        refs[here + "lora_A.weight"] = a.reshape(a.shape[0], *update.kernel_size) if ones else a
        refs[here + "lora_B.weight"] = b.reshape(*b.shape, *ones) if ones else b
        m = m.reshape(1, -1, *ones) if m and ones else m
    if m is not None:
        refs[here + "lora_magnitude_vector"] = m
    if update.bias is not None:
        refs[here + "lora_B.bias"] = update.bias.over(entry.low.scaling)
    if isinstance(update.delta, Started) and update.delta.start == "kasa":
        import torch

        refs[here + "lora_diag"] = constant(torch.ones(entry.low.rank))  # what was there is in lora_A


def _folded(adapter: Adapter) -> Adapter:
    """The same with scaling 1 and one rank for all: for servers that know neither patterns nor rsLoRA.

    lora_B takes the scaling, and the smaller ranks are padded with zeros.
    """
    ranks = [u.delta.rank for u in adapter.updates if isinstance(u.delta, LowRank)]
    if any(not isinstance(u.delta, LowRank | Tokens) for u in adapter.updates):
        raise TargetError("Only a LoRA or DoRA has a scaling to fold; merge this adapter instead.")
    most = max(ranks, default=1)

    attentions = _attentions(adapter)

    def fold(update: Update) -> Update:
        low = update.delta
        if not isinstance(low, LowRank):
            return update
        twice = 2.0 if update.module.endswith(".out_proj") and update.module.rpartition(".")[0] in attentions else 1.0
        a, b = low.lora_A, low.lora_B.times(low.scaling / twice)
        if low.rank < most:
            dtypes = a.dtype, b.kept
            a = replace(assembled((most, a.shape[1]), [(a, 0, 0)]), dtype=dtypes[0])
            b = replace(assembled((b.shape[0], most), [(b, 0, 0)]), dtype=dtypes[1])
        return replace(update, delta=LowRank(a, b, twice, "folded"))

    extra = {**adapter.extra, "modules": ()}
    return replace(adapter, updates=tuple(map(fold, adapter.updates)), rslora=False, extra=extra)


def _config(adapter: Adapter, old: Mapping[str, Any], entries: Sequence[_Entry]) -> dict[str, Any]:
    """The old config with what differs replaced; its own patterns stay where they still say the truth."""
    config: dict[str, Any] = {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "task_type": adapter.task,
        "lora_dropout": 0.0,
    }
    config |= dict(old)
    config |= {"peft_type": "LORA", "inference_mode": True, "use_dora": adapter.is_dora}
    config["base_model_name_or_path"] = adapter.base_model
    config["lora_bias"] = any(update.bias is not None for update in adapter.updates)
    if adapter.rslora is not None:
        config["use_rslora"] = adapter.rslora
    config |= {"use_bdlora": None} if config.get("use_bdlora") else {}
    if config.pop("unsloth_fused_expert_lora", None) or config.get("lora_B_layout") or _unsloth(config):
        config["lora_B_layout"] = "rank_major"  # of experts; as PEFT has it
    config |= {name: None for name in ("velora_config", "monteclora_config") if config.get(name)}
    config |= {"use_qalora": False} if config.get("use_qalora") else {}
    _config_start(config, entries)
    rule = sqrt if config.get("use_rslora") else float
    ranks, alphas = Patterns(config, "rank_pattern", "r", 8), Patterns(config, "alpha_pattern", "lora_alpha", 8)
    modules = tuple(u.module for u in adapter.updates)
    kept = set(adapter.extra.get("modules", ())) == set(modules) and all(
        ranks[e.name] == e.low.rank and alphas[e.name] / rule(e.low.rank) == e.low.scaling for e in entries
    )
    if not kept:
        config["target_modules"] = sorted({_target(e) for e in entries if not e.parameter})
        config["exclude_modules"] = config["layers_to_transform"] = config["layers_pattern"] = None
        parameters = sorted({e.name for e in entries if e.parameter})
        config["target_parameters"] = parameters or None
        for value, default, table in (
            ({e.name: e.low.rank for e in entries}, "r", "rank_pattern"),
            ({e.name: e.low.scaling * rule(e.low.rank) for e in entries}, "lora_alpha", "alpha_pattern"),
        ):
            lows = {e.name: e.low for e in entries}
            exact = {m: _tidy(v, lows[m], rule) for m, v in value.items()}
            config[default] = Counter(exact.values()).most_common(1)[0][0] if exact else 8
            # ^ and the escaped path: hits exactly this module (PEFT ≥ 0.15)
            config[table] = {f"^{re.escape(m)}": v for m, v in exact.items() if v != config[default]}
    tokens = {u.module: list(u.delta.indices) for u in adapter.updates if isinstance(u.delta, Tokens)}
    if not kept or not config.get("trainable_token_indices"):
        config["trainable_token_indices"] = tokens or None
    config["layer_replication"] = [list(pair) for pair in adapter.layers] or None
    saved = {name.rpartition(".")[0] for name, r in adapter.replaced.items() if not r.shared}
    said = config.get("modules_to_save") or []
    new = {module for module in saved if not saved_whole(module, said)}
    if new:
        config["modules_to_save"] = sorted({*said, *new})
    config.setdefault("fan_in_fan_out", any(u.transposed for u in adapter.updates if u.kind != "expert"))
    config.setdefault("init_lora_weights", True)
    return config


def _unsloth(config: Mapping[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    return isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))


def _target(entry: _Entry) -> str:
    """What PEFT's target_modules calls it: of an nn.MultiheadAttention, whose out_proj comes along, the whole."""
    return entry.key.partition(".base_layer")[0]


def _config_start(config: dict[str, Any], entries: Sequence[_Entry]) -> None:
    """How the factors began, which PEFT repeats when it loads them: only where they still mean that."""
    start = next((e.update.delta.start for e in entries if isinstance(e.update.delta, Started)), None)
    if start != "kasa":
        config |= {"kasa_config": None} if config.get("kasa_config") else {}
        init = str(config.get("init_lora_weights", True)).lower()
        if start is not None:
            config["init_lora_weights"] = start
        elif init not in PLAIN_STARTS:
            config["init_lora_weights"] = True
        if config.get("loftq_config"):
            config["loftq_config"] = {}
        for option in ("corda_config", "lora_ga_config"):
            if config.get(option):
                config[option] = None
    elif not config.get("kasa_config"):
        config["kasa_config"] = {}


def _tidy(value: float, low: LowRank, rule: Callable[[float], float]) -> float:
    """A rank or alpha as a person would write it, where that gives the same scaling to the last bit."""
    near = round(value, 9)
    value = near if near / rule(low.rank) == low.scaling else value
    return int(value) if value == int(value) else value
