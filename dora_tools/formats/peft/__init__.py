"""PEFT's directory: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

The tensors say which modules and which rank; the config says the method, the scaling, and what the keys do not name. A
key without an adapter leaf is a whole trained tensor. What a merge would get wrong is refused by name.

``config`` reads the options, ``keys`` sorts the names; ``lora``, ``experts``, ``tokens`` and ``methods`` make updates
of them; ``writing`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ...adapter import Adapter, Replacement, Update
from ...checkpoint import Checkpoint, View, ref
from ...errors import InputError
from .. import Format, Given, Reading
from . import experts, lora
from .config import KNOWN, Patterns, checked, version_of
from .keys import Keys, Module, sort_keys
from .methods import METHODS
from .tokens import token_rows
from .writing import write

_STATE_KEY = re.compile(r"^base_model\.model\..*\.lora_(embedding_)?A\b|\.lora_(embedding_)?A\.default\b")
_LORA = ("LORA", "TRAINABLE_TOKENS")
_MOST_RANGES = 1000


def _sniff(checkpoint: Checkpoint) -> bool:
    config = checkpoint.metadata.get("adapter_config")
    if config is None:  # a state dict of the whole model, or of its trained part
        return _is_state(checkpoint.tensors.keys())
    return not (isinstance(config, dict) and config.get("peft_type") == "DORA")


def _is_state(names: Collection[str]) -> bool:
    """Whether these are keys of a PeftModel: with its marks, or ``x.lora_A.weight`` beside ``x.lora_B.weight``."""
    if any(_STATE_KEY.search(name) for name in names):
        return True
    if any("weight_m_wdecomp" in name or ".dora_layer." in name for name in names):
        return False
    return any(n.endswith(".lora_A.weight") and n.removesuffix("A.weight") + "B.weight" in names for n in names)


def _assumed(checkpoint: Checkpoint, given: Given) -> dict[str, Any]:
    """The config of a bare state dict, as far as its names and the user tell it. Raises InputError without a scale."""
    if given.scaling is None and (given.alpha is None or given.scale_rule not in ("alpha/rank", "rslora")):
        raise InputError(
            "These are PEFT's keys without its adapter_config.json, so the scale is not recorded. Say --alpha with "
            "--scale-rule alpha/rank (PEFT's default) or --scale-rule rslora, or --scaling with the number itself."
        )
    return {
        "peft_type": "LORA",
        "lora_alpha": given.alpha or 1,
        "use_rslora": given.scale_rule == "rslora",
        "use_dora": any("lora_magnitude_vector" in name for name in checkpoint.tensors),
    }


def _read(checkpoint: Checkpoint, given: Given) -> Reading:
    bare = "adapter_config" not in checkpoint.metadata
    config = checked(_assumed(checkpoint, given) if bare else checkpoint.metadata["adapter_config"], {*_LORA, *METHODS})
    notes: list[str] = []
    doubt = ""
    if config["peft_type"] in _LORA:
        keys = sort_keys(checkpoint, config, lora.LEAVES, lora.ONLY_TRAINING, lambda s: s.startswith("lora_"))
        updates, doubt = _lora(checkpoint, config, keys, given, bare, notes)
    else:
        method = METHODS[config["peft_type"]]
        keys = sort_keys(checkpoint, config, method.leaves, method.only_training, method.begins)
        updates = method.read(checkpoint, config, keys, given, notes)
    updates += token_rows(checkpoint, config, keys)
    _note_options(checkpoint, config, keys, bare, given, notes)
    if config["peft_type"] == "LORA" and (note := lora.start_note(config, given)):
        notes.append(note)
    if layers := _layers(config):
        notes.append(
            f"Trained with replicated layers: {sum(last - first for first, last in layers)} in place of the base's."
        )
    if doubt:
        notes.append(f"Without --base it is not sure {doubt}.")
    base = config.get("base_model_name_or_path")
    extra = {
        "peft": {**_own_options(checkpoint, config), **keys.options},
        "modules": tuple(u.module for u in updates),
        "peft_tensors": {
            keys.renamed.get(key, key): ref(checkpoint, key)
            for group in (*(m.parts for m in keys.modules.values()), keys.shared, keys.tokens)
            for key in group.values()
        },
        "peft_updates": tuple(updates),
        "peft_parameters": experts.nesting(updates),
    }
    adapter = Adapter(
        tuple(updates),
        keys.replaced,
        base if isinstance(base, str) and base else None,
        config["task_type"] if isinstance(config.get("task_type"), str) else None,
        "peft",
        bool(config["use_rslora"]) if "use_rslora" in config else None,
        extra,
        tuple(notes),
        layers=layers,
    )
    # an adapter's directory may hold a base weight or two (saved embeddings), but no model
    gathered = bare or "hyper_parameters" in checkpoint.metadata
    own_base = _own_base(checkpoint, updates, keys.replaced) if gathered else None
    if own_base is not None:
        own = {f"{update.module}.{part}" for update in updates for part in ("weight", "bias")}
        adapter = replace(adapter, replaced={name: r for name, r in keys.replaced.items() if name not in own})
    return Reading(adapter, keys.left_out, own_base, doubt=f"Say --base: it is not sure {doubt}." if doubt else "")


def _lora(
    checkpoint: Checkpoint, config: Mapping[str, Any], keys: Keys, given: Given, bare: bool, notes: list[str]
) -> tuple[list[Update], str]:
    ranks, alphas = Patterns(config, "rank_pattern", "r", 8), Patterns(config, "alpha_pattern", "lora_alpha", 8)
    asked = config.get("target_parameters") or config.get("use_qalora")
    places = experts.hf_places(given) if asked else None
    settings = lora.Settings(config, given, alphas, places)
    attentions = lora.attentions(keys)
    by_path: dict[str, list[Module]] = {}
    for module in keys.modules.values():
        by_path.setdefault(module.path, []).append(module)
    layers: list[Update] = []
    others: list[Update] = []
    stacks: list[list[Module]] = []
    odd: list[str] = []
    names: list[str] = []  # as the patterns know them
    for path, levels in by_path.items():
        parameters = experts.targeted(path, config, places)
        if levels[0].depth or len(levels) > 1:
            parameters = experts.targeted(path, config)
        if path in attentions and len(levels) == 1:
            update = lora.layer(checkpoint, levels[0], settings)
            others.append(replace(update, parameter="in_proj_weight", transposed=False, told=True))
            names.append(path)
        elif parameters not in ([], ["weight"]) or len(levels) > 1:
            levels.sort(key=lambda level: level.depth)
            stacks.append(levels)
            names += [f"{path}.{parameter}" for parameter in parameters]
        else:
            twice = levels[0].within in attentions and _applied_twice(config, given)
            names.append(f"{path}.weight" if parameters else path)
            # PEFT gives an out_proj of nn.MultiheadAttention the rank and alpha of the whole
            known_by = str(levels[0].within) if levels[0].within in attentions else names[-1]
            layers.append(lora.layer(checkpoint, levels[0], settings, known_by, twice))
            found_rank = layers[-1].delta
            rank = getattr(found_rank, "rank", None)
            if not bare and rank and ranks[names[-1]] != rank and not given.initial:
                odd.append(f"{path}: the config says r = {ranks[path]:g}, the tensors have {rank}")
    if odd:
        notes.append(odd[0] + (f", and so on in {len(odd) - 1} more modules." if len(odd) > 1 else "."))
    lora.check_magnitudes(config, layers)
    stacked, doubt = experts.stacked(checkpoint, stacks, settings, ranks, given) if stacks else ([], "")
    others += stacked
    if config.get("use_qalora") and places is None:
        doubt = "whether lora_A is of pooled inputs (QALoRA), which PEFT does for GPTQ layers only"
    notes += ranks.notes(names) + alphas.notes(names)
    for target in config.get("target_parameters") or ():
        owner, parameter = target.rpartition(".")[::2]
        if owner and not any(f".{path}".endswith(f".{owner}") for path in by_path):
            notes.append(f"target_parameters: '{target}' matches no adapted module ({parameter} was not trained).")
    if attentions:
        notes.append(
            f"{', '.join(sorted(attentions))}: PEFT applies the factors of an out_proj of nn.MultiheadAttention twice, "
            "in training as well, so they are merged twice. --mha-out-proj once merges them once."
        )
    return layers + others, doubt


def _applied_twice(config: Mapping[str, Any], given: Given) -> bool:
    """Raises InputError for a PEFT of which dora-tools does not know whether it still does."""
    version = version_of(config, given.peft_version)
    if given.mha_out_proj is None and version is not None and version >= (0, 22):
        raise InputError(
            "PEFT up to 0.21 applies the factors of an out_proj of nn.MultiheadAttention twice, and this adapter is of "
            "a newer one, which may have mended that: say --mha-out-proj once or twice."
        )
    return given.mha_out_proj != "once"


def _layers(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """``layer_replication``: ranges [start, end) of the base's layers, one after the other."""
    said = config.get("layer_replication") or []
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in said] if isinstance(said, list) else [()]
    if not all(len(p) == 2 and all(isinstance(i, int) and not isinstance(i, bool) for i in p) for p in pairs):
        raise InputError(f"adapter_config.json: layer_replication must be pairs of layer numbers, not {said!r}.")
    if any(not 0 <= first < last for first, last in pairs):
        raise InputError(f"adapter_config.json: layer_replication has a range without layers: {said!r}.")
    if len(pairs) > _MOST_RANGES:
        raise InputError(f"adapter_config.json: layer_replication has {len(pairs)} ranges, which no model has.")
    return tuple((first, last) for first, last in pairs)


def _note_options(
    checkpoint: Checkpoint, config: Mapping[str, Any], keys: Keys, bare: bool, given: Given, notes: list[str]
) -> None:
    if not bare and (given.alpha, given.scale_rule, given.scaling) != (None, None, None):
        notes.append("The scaling is the one asked for, not that of adapter_config.json.")
    unknown = sorted(name for name, value in config.items() if name not in KNOWN and value)
    if unknown and config["peft_type"] == "LORA" and "hyper_parameters" not in checkpoint.metadata:
        notes.append(f"adapter_config.json has options that dora-tools does not know: {', '.join(unknown)}.")
    version = version_of(config, given.peft_version)
    lost = config.get("bias") == "lora_only" and (version is None or version < (0, 21))
    if lost and not any(name.endswith("bias") for name in keys.replaced):
        notes.append(
            "The config says bias = 'lora_only', but no bias is in the file: PEFT 0.7 to 0.20 did not save the "
            "biases of adapted layers, so what was trained there is lost."
        )


def _own_options(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that is worth keeping: of one gathered from hyper-parameters, only what are PEFT's own options."""
    gathered = "hyper_parameters" in checkpoint.metadata
    return {name: value for name, value in config.items() if name in KNOWN or not gathered}


def _own_base(checkpoint: Checkpoint, updates: list[Update], replaced: Mapping[str, Replacement]) -> Checkpoint | None:
    """The whole model, where the file is a state dict that holds the base weight of every adapted module."""
    if not updates or not all(f"{update.module}.weight" in replaced for update in updates):
        return None
    keys = {name: r.tensor.key for name, r in replaced.items()}
    return View(
        {name: (checkpoint, key) for name, key in keys.items()},
        {name: checkpoint.tensors[key] for name, key in keys.items()},
        {"config": checkpoint.metadata.get("config", {})},
    )


FORMAT = Format("peft", "PEFT: adapter_config.json and adapter_model.safetensors or .bin", _sniff, _read, write)
