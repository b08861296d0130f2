"""``adapter_config.json``: what in it changes a merge, and what of it is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import InputError, UnsupportedError
from ...names.patterns import compiled

# options of PEFT 0.21's LoraConfig that change nothing in a merge, or are read here
_OPTIONS = """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_B_layout lora_dropout
    lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters task_type
    trainable_token_indices unsloth_fused_expert_lora use_bdlora use_dora use_qalora use_rslora velora_config
"""
KNOWN = frozenset(_OPTIONS.split())
# peft_types that are no change of weights, each with what they do instead
_INPUT = "puts trained vectors before the input and changes no weight"
_REFUSED = {
    "ADAPTION_PROMPT": "adds trained vectors to the attention of the running model",
    "CPT": _INPUT,
    "CARTRIDGE": _INPUT,
    "MULTITASK_PROMPT_TUNING": _INPUT,
    "P_TUNING": _INPUT,
    "PREFIX_TUNING": _INPUT,
    "PROMPT_TUNING": _INPUT,
    "POLY": "mixes several LoRAs by a task's number, which only the running model knows",
    "XLORA": "mixes several LoRAs by what the input is, which only the running model knows",
    "LILY": "mixes shared factors by a router, which only the running model knows",
}
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "activated LoRA applies from certain tokens of the input on",
    "arrow_config": "Arrow chooses between adapters by the input",
}
# init_lora_weights that leave the base as it is; every other one trains on a changed base
PLAIN_STARTS = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


def checked(config: Any, methods: Collection[str]) -> dict[str, Any]:
    """The config, if a merge of what it describes is defined. Raises InputError and UnsupportedError."""
    if not isinstance(config, dict):
        raise InputError("adapter_config.json is missing or not an object; PEFT writes it beside the weights.")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in methods:
        why = _REFUSED.get(str(kind))
        raise UnsupportedError(
            f"adapter_config.json says peft_type {kind!r}, which {why}: there is nothing to merge."
            if why
            else f"adapter_config.json says peft_type {kind!r}; dora-tools reads {', '.join(sorted(methods))}. PEFT's "
            "own merge_and_unload may merge it, with the whole model in memory."
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise UnsupportedError(
                f"adapter_config.json sets {option}: {reason}, so no merged weight can do the same. Serve it with PEFT."
            )
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying", "use_qalora"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"adapter_config.json: {name} must be true or false, not {config[name]!r}.")
    for name in ("modules_to_save", "target_parameters"):
        saved = config.get(name)
        if saved is not None and not (isinstance(saved, list) and all(isinstance(n, str) and n for n in saved)):
            raise InputError(f"adapter_config.json: {name} must be a list of names, not {saved!r}.")
    for name in ("rank_pattern", "alpha_pattern", "kasa_config"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"adapter_config.json: {name} must be an object, not {config[name]!r}.")
    return config


def start_of(config: Mapping[str, Any]) -> str:
    """How the factors began, in lower case: a name of ``init_lora_weights``, or kasa."""
    return "kasa" if config.get("kasa_config") is not None else str(config.get("init_lora_weights", True)).lower()


def version_of(config: Mapping[str, Any], said: str | None) -> tuple[int, ...] | None:
    """The version of PEFT that wrote the adapter, by the user or the config (since 0.18); None: nobody knows."""
    text = said or config.get("peft_version")
    if not isinstance(text, str):
        return None
    numbers = []
    for piece in text.split("@")[0].split(".")[:3]:
        digits = "".join(c for c in piece if c.isdigit())
        if not digits or not piece[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers) or None


class Patterns:
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
        used: set[str] = set()
        torn: dict[tuple[str, int], list[str]] = {}
        for module in modules:
            matching = list(self._matching(module))
            used.update(pattern for pattern, _ in matching)
            if len({value for _, value in matching}) > 1:
                torn.setdefault((matching[0][0], len(matching)), []).append(module)
        said = [
            f"{at[0]}{f' and {len(at) - 1} more modules' if len(at) > 1 else ''}: {self._table} has {count} patterns "
            f"that match; '{first}' comes first in the file and is used, as PEFT does on loading, but training may "
            "have used another."
            for (first, count), at in torn.items()
        ]
        said += [f"{self._table}: '{p}' matches no module." for p, _, _ in self._rules if p not in used]
        return said
