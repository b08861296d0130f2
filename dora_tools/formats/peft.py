"""PEFT's LoRA and DoRA directory: ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

Keys are ``base_model.model.<module>.<leaf>``. The tensors say which modules and which rank; the config says the
scaling and whether this is DoRA. A key without an adapter leaf is a whole trained tensor. What a merge would get wrong
is refused by name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import Any

from ..adapter import Adapter, LowRank, Magnitude, Replacement, Update
from ..checkpoint import Checkpoint, Ref, Tensors, View, ref
from ..errors import InputError, TargetError, UnsupportedError
from ..names.patterns import ADAPTER_PART, compiled
from . import Format, Given, Reading, Target, Written

_LEAVES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "m",
}
_STATE_KEY = re.compile(r"^base_model\.model\..*\.lora_(embedding_)?A\b|\.lora_(embedding_)?A\.default\b")
# options of PEFT 0.21's LoraConfig that change nothing in a merge, or are read here
_KNOWN = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    ]
)
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_PREFIX = "base_model.model."
# init_lora_weights that leave the base as it is; every other one trains on a changed base
_PLAIN_INITS = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


@dataclass
class _Module:
    """What the keys of one module hold, by role."""

    parts: dict[str, str] = field(default_factory=dict)  # A, B, m, bias → key
    embedding: bool = False


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
    config = _checked(_assumed(checkpoint, given) if bare else checkpoint.metadata["adapter_config"])
    modules, replaced, left_out = _sort_keys(checkpoint, config)
    rank, notes = _Patterns(config, "rank_pattern", "r", 8), []
    alpha = _Patterns(config, "alpha_pattern", "lora_alpha", 8)
    updates = [_update(checkpoint, config, path, module, alpha, given) for path, module in modules.items()]
    _check_magnitudes(config, updates)
    for update in updates:
        delta = update.delta
        assert isinstance(delta, LowRank)
        if not bare and rank[update.module] != delta.rank:
            notes.append(
                f"{update.module}: the config says r = {rank[update.module]:g}, the tensors have {delta.rank}."
            )
    if not bare and (given.alpha, given.scale_rule, given.scaling) != (None, None, None):
        notes.append("The scaling is the one asked for, not that of adapter_config.json.")
    notes += rank.notes([u.module for u in updates]) + alpha.notes([u.module for u in updates])
    unknown = sorted(name for name, value in config.items() if name not in _KNOWN and value)
    if unknown and "hyper_parameters" not in checkpoint.metadata:
        notes.append(f"adapter_config.json has options that dora-tools does not know: {', '.join(unknown)}.")
    if config.get("bias", "none") != "none" and not any(name.endswith("bias") for name in replaced):
        notes.append(
            f"The config says bias = '{config['bias']}', but no bias is in the file: PEFT 0.7 to 0.20 did not save the "
            "biases of adapted layers, so what was trained there is lost."
        )
    base = config.get("base_model_name_or_path")
    adapter = Adapter(
        tuple(updates),
        replaced,
        base if isinstance(base, str) and base else None,
        config["task_type"] if isinstance(config.get("task_type"), str) else None,
        "peft",
        bool(config["use_rslora"]) if "use_rslora" in config else None,
        {"peft": _own_options(checkpoint, config), "modules": tuple(modules)},
        tuple(notes),
    )
    # an adapter's directory may hold a base weight or two (saved embeddings), but no model
    gathered = bare or "hyper_parameters" in checkpoint.metadata
    base = _own_base(checkpoint, updates, replaced) if gathered else None
    if base is not None:
        own = {f"{update.module}.{part}" for update in updates for part in ("weight", "bias")}
        adapter = replace(adapter, replaced={name: r for name, r in replaced.items() if name not in own})
    return Reading(adapter, left_out, base)


def _own_options(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that is worth keeping: of one gathered from hyper-parameters, only what are PEFT's own options."""
    gathered = "hyper_parameters" in checkpoint.metadata
    return {name: value for name, value in config.items() if name in _KNOWN or not gathered}


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


def _checked(config: Any) -> dict[str, Any]:
    """The config, if a merge of what it describes is defined. Raises InputError and UnsupportedError."""
    if not isinstance(config, dict):
        raise InputError("adapter_config.json is missing or not an object; PEFT writes it beside the weights.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"adapter_config.json says peft_type {kind!r}; dora-tools reads LORA (with DoRA) so far."
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in _PLAIN_INITS:
        raise UnsupportedError(
            f"init_lora_weights = '{init}' trains against a changed base, so adding this adapter to the original base "
            "would be wrong. Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )
    refused = {
        "layer_replication": "layers are replicated",
        "alora_invocation_tokens": "activated LoRA depends on the input",
        "arrow_config": "Arrow routes between adapters by the input",
        "use_qalora": "QALoRA pools its inputs",
        "use_bdlora": "BD-LoRA stores block-diagonal factors",
        "kasa_config": "KaSA changes the base",
        "target_parameters": "it adapts bare (expert) parameters",
        "trainable_token_indices": "it replaces single token rows",
        "ensure_weight_tying": "it adapts tied layers together",
    }
    for option, reason in refused.items():
        if config.get(option):
            raise UnsupportedError(f"adapter_config.json sets {option} ({reason}); dora-tools cannot merge that yet.")
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"adapter_config.json: {name} must be true or false, not {config[name]!r}.")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        raise InputError(f"adapter_config.json: modules_to_save must be a list of names, not {saved!r}.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(
                f"adapter_config.json: {name} must be an object of pattern → number, not {config[name]!r}."
            )
    return config


class _Patterns:
    """PEFT's per-module values: the first pattern in file order that matches the end of the path, else the default."""

    def __init__(self, config: Mapping[str, Any], table: str, default: str, fallback: float) -> None:
        self._table, self._default = table, config.get(default, fallback)
        self._rules = []
        for pattern, value in (config.get(table) or {}).items():
            rule = compiled(pattern, f"adapter_config.json: {table}", 3, r"(.*\.)?({})$")
            self._rules.append((pattern, rule, value))
        for value in [self._default, *(value for _, _, value in self._rules)]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
                raise InputError(f"adapter_config.json: {default} or {table} holds {value!r}, which is not a number.")

    def _matching(self, module: str) -> Iterator[tuple[str, float]]:
        return ((pattern, value) for pattern, rule, value in self._rules if rule.match(module))

    def __getitem__(self, module: str) -> float:
        return next((value for _, value in self._matching(module)), self._default)

    def notes(self, modules: list[str]) -> list[str]:
        """Sentences on patterns that match nothing, and on modules where the order of patterns decides."""
        said: list[str] = []
        used: set[str] = set()
        for module in modules:
            matching = list(self._matching(module))
            used.update(pattern for pattern, _ in matching)
            if len({value for _, value in matching}) > 1:
                said.append(
                    f"{module}: {self._table} has {len(matching)} patterns that match; '{matching[0][0]}' comes first "
                    "in the file and is used, as PEFT does on loading, but training may have used another."
                )
        said += [f"{self._table}: '{p}' matches no module." for p, _, _ in self._rules if p not in used]
        return said


def _sort_keys(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> tuple[dict[str, _Module], dict[str, Replacement], dict[str, str]]:
    """Every key to a module's role, to a replacement, or to ``left_out`` with the reason."""
    modules: dict[str, _Module] = {}
    replaced: dict[str, Replacement] = {}
    left_out: dict[str, str] = {}
    adapters: set[str] = set()
    saved = config.get("modules_to_save") or ()
    for key in checkpoint.tensors:
        path = [segment for segment in key.removeprefix("module.").split(".") if segment not in _WRAPPERS]
        if path[:2] == ["base_model", "model"]:
            path = path[2:]
        if not path or not all(path):
            raise InputError(f"{key!r} is no name of a tensor in a model.")
        at = next((i for i, segment in enumerate(path) if segment.startswith("lora_")), None)
        if at is None and ADAPTER_PART.search(key):
            raise InputError(f"{key} belongs to an adapter, but is none of PEFT's keys: is the file of two formats?")
        if at is None:
            _sort_saved(checkpoint, key, path, saved, replaced, left_out)
            continue
        leaf, tail = path[at], path[at + 1 :]
        name = tail.pop() if tail and tail[-1] in {"weight", "bias"} else "weight"
        role = _LEAVES.get(leaf)
        if role is None or (name == "bias" and leaf != "lora_B"):
            raise UnsupportedError(f"{key}: PEFT's '{leaf}' {name} is not something dora-tools can merge yet.")
        if "base_layer" in path[:at]:
            raise UnsupportedError(
                f"{key} adapts a layer inside another adapted layer (nn.MultiheadAttention or expert parameters); "
                "dora-tools cannot merge that yet."
            )
        adapters.add(".".join(tail))
        if len(adapters) > 1:
            names = ", ".join(sorted(repr(name or "default") for name in adapters))
            raise InputError(f"The file holds several adapters ({names}); save the one that is wanted alone.")
        module = modules.setdefault(".".join(path[:at]), _Module())
        module.embedding |= "embedding" in leaf
        role = "bias" if name == "bias" else role
        if role in module.parts:
            raise InputError(f"{key} and {module.parts[role]} are the same tensor of {'.'.join(path[:at])}, twice.")
        module.parts[role] = key
    return modules, replaced, left_out


def _sort_saved(
    checkpoint: Checkpoint,
    key: str,
    path: list[str],
    saved: Any,
    replaced: dict[str, Replacement],
    left_out: dict[str, str],
) -> None:
    if "token_adapter" in path or path[-1] == "trainable_tokens_delta":
        raise UnsupportedError(f"{key} holds single token rows; dora-tools cannot merge trainable tokens yet.")
    if "original_module" in path:
        left_out[key] = "the untrained copy that PEFT keeps beside a saved module"
        return
    own = "modules_to_save" in path
    if own:
        at = path.index("modules_to_save")
        # modules_to_save[.<adapter name>].<parameter>
        path = path[:at] + (path[at + 2 :] if len(path) - at > 2 else path[at + 1 :])
    path = [segment for segment in path if segment != "base_layer"]
    name = ".".join(path)
    module = ".".join(path[:-1])
    own |= any(module == s or module.endswith(f".{s}") or f".{s}." in f".{module}." for s in saved)
    if 0 in checkpoint.tensors[key].shape:
        raise InputError(
            f"{key} is empty (shape {list(checkpoint.tensors[key].shape)}): it was saved under DeepSpeed ZeRO-3 or "
            "FSDP without gathering. Save it again with the parameters gathered."
        )
    previous = replaced.get(name)
    if previous is not None:
        again = ref(checkpoint, key)
        if again.shape != previous.tensor.shape or not bool((again.load() == previous.tensor.load()).all()):
            raise InputError(f"{key} and {previous.tensor.key} are both {name}, with different values: which is it?")
        left_out[previous.tensor.key if own else key] = f"a second copy of {name}"
        if not own:
            return
    replaced[name] = Replacement(ref(checkpoint, key), shared=not own)


def _update(
    checkpoint: Checkpoint, config: Mapping[str, Any], path: str, module: _Module, alpha: _Patterns, given: Given
) -> Update:
    parts = module.parts
    for role, name in (("A", "lora_A"), ("B", "lora_B")):
        if role not in parts:
            raise InputError(f"{path} has {', '.join(parts.values())}, but no {name}: the file is incomplete.")
    a, b = ref(checkpoint, parts["A"]), ref(checkpoint, parts["B"])
    kernel_size: tuple[int, ...] = ()
    if len(a.shape) > 2 and 0 not in a.shape and 0 not in b.shape:
        kernel_size = a.shape[1:]
        if b.shape[1] != a.shape[0] or prod(b.shape[2:]) != 1:
            raise UnsupportedError(
                f"{path}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}: a grouped convolution, whose "
                "merge PEFT does not define."
            )
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    rank = a.shape[0]
    scaling = alpha[path] / (sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    source = _provenance(config, rank, alpha[path])
    if rank and (given.alpha is not None or given.scale_rule is not None):
        number = alpha[path] if given.alpha is None else given.alpha
        rule = given.scale_rule or ("rslora" if config.get("use_rslora") else "alpha/rank")
        numbers = {"alpha": number, "alpha/rank": number / rank, "rslora": number / sqrt(rank), "one": 1.0}
        scaling, source = numbers[rule], f"{rule} of {number:g}, as asked for"
    if given.scaling is not None:
        scaling, source = given.scaling, "--scaling"
    if not scaling and 0 not in a.shape:
        raise InputError(
            f"{path}: adapter_config.json says lora_alpha = {alpha[path]:g}, which would erase the adapter (some "
            "tools, verl for one, write 0 for 'unknown'). Put the alpha of the training there."
        )
    magnitude = ref(checkpoint, parts["m"]).reshape(-1) if "m" in parts else None
    return Update(
        path,
        LowRank(a, b, scaling or 1.0, source),
        Magnitude(magnitude, "out") if magnitude is not None else None,
        ref(checkpoint, parts["bias"]).times(scaling) if "bias" in parts else None,
        "embedding" if module.embedding else "conv" if kernel_size else "linear",
        kernel_size,
        bool(config["fan_in_fan_out"]) if "fan_in_fan_out" in config else None,
    )


def _provenance(config: Mapping[str, Any], rank: int, alpha: float) -> str:
    return f"{alpha:g}/√{rank} (rsLoRA)" if config.get("use_rslora") else f"{alpha:g}/{rank}"


def _check_magnitudes(config: Mapping[str, Any], updates: list[Update]) -> None:
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


def _write(adapter: Adapter, target: Target) -> Written:
    """PEFT's directory. Raises TargetError for what it cannot hold: an in-axis magnitude, a delta of another kind."""
    old: Mapping[str, Any] = adapter.extra.get("peft", {})
    refs: dict[str, Ref] = {}
    targets = {update.module for update in adapter.updates}
    bare = [update.module for update in adapter.updates if update.magnitude is None]
    if adapter.is_dora and bare:
        raise TargetError(
            f"{bare[0]} has no magnitude and other modules have: PEFT's use_dora is for all. to-dora can give the LoRA "
            "modules theirs; a dense merge keeps both kinds."
        )
    for update in adapter.updates:
        delta, here = update.delta, f"{_PREFIX}{update.module}."
        if not isinstance(delta, LowRank):
            raise TargetError(f"{update.module}: PEFT's LoRA holds low-rank updates only; merge the adapter instead.")
        a, b, m = delta.lora_A, delta.lora_B, update.magnitude.vector if update.magnitude else None
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
            refs[here + "lora_B.bias"] = update.bias.over(delta.scaling)
    for name, replacement in adapter.replaced.items():
        module, _, parameter = name.rpartition(".")
        infix = "base_layer." if module in targets else ""
        refs[f"{_PREFIX}{module}.{infix}{parameter}"] = replacement.tensor
    config = _written_config(adapter, old)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    return Written(Tensors(refs), "adapter_model.safetensors", {"adapter_config.json": text})


def _written_config(adapter: Adapter, old: Mapping[str, Any]) -> dict[str, Any]:
    """The old config with what differs replaced; its own patterns stay where they still say the truth."""
    config: dict[str, Any] = {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "task_type": adapter.task,
        "lora_dropout": 0.0,
    }
    config |= dict(old)
    deltas = {u.module: u.delta for u in adapter.updates if isinstance(u.delta, LowRank)}
    config |= {"peft_type": "LORA", "inference_mode": True, "use_dora": adapter.is_dora}
    config["base_model_name_or_path"] = adapter.base_model
    config["lora_bias"] = any(update.bias is not None for update in adapter.updates)
    if adapter.rslora is not None:
        config["use_rslora"] = adapter.rslora
    rule = sqrt if config.get("use_rslora") else float
    ranks, alphas = _Patterns(config, "rank_pattern", "r", 8), _Patterns(config, "alpha_pattern", "lora_alpha", 8)
    kept = set(adapter.extra.get("modules", ())) == set(deltas) and all(
        ranks[module] == delta.rank and alphas[module] / rule(delta.rank) == delta.scaling
        for module, delta in deltas.items()
    )
    if not kept:
        config["target_modules"] = sorted(deltas)
        for value, default, table in (
            ({m: d.rank for m, d in deltas.items()}, "r", "rank_pattern"),
            ({m: d.scaling * rule(d.rank) for m, d in deltas.items()}, "lora_alpha", "alpha_pattern"),
        ):
            exact = {m: _tidy(v, deltas[m], rule) for m, v in value.items()}
            config[default] = Counter(exact.values()).most_common(1)[0][0] if exact else 8
            # ^ and the escaped path: hits exactly this module (PEFT ≥ 0.15)
            config[table] = {f"^{re.escape(m)}": v for m, v in exact.items() if v != config[default]}
    saved = {name.rpartition(".")[0] for name, r in adapter.replaced.items() if not r.shared}
    said = config.get("modules_to_save") or []
    if any(not any(module == end or module.endswith(f".{end}") for end in said) for module in saved):
        config["modules_to_save"] = sorted({*said, *saved})
    config.setdefault("fan_in_fan_out", any(u.transposed for u in adapter.updates))
    config.setdefault("init_lora_weights", True)
    return config


def _tidy(value: float, delta: LowRank, rule: Callable[[float], float]) -> float:
    """A rank or alpha as a person would write it, where that gives the same scaling to the last bit."""
    near = round(value, 9)
    value = near if near / rule(delta.rank) == delta.scaling else value
    return int(value) if value == int(value) else value


FORMAT = Format("peft", "PEFT: adapter_config.json and adapter_model.safetensors or .bin", _sniff, _read, _write)
