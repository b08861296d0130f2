"""Adapters by a table: its rules, layouts and recipe applied to a checkpoint, and in the other direction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ...adapter import Adapter, LowRank, Replacement, Unchanged
from ...checkpoint import Checkpoint, Ref, Tensors, View, ref
from ...errors import InputError, TargetError
from ...names.ties import may_be_tied
from .. import Format, Given, Reading, Target, Written
from .keys import Module, Reader, check_axis, check_flags, check_present, new_names, once, refuse_leftovers, sort
from .layouts import decide_orientation, decide_square, find_weights, measure
from .scaling import rank_notes, told_scale
from .shapes import labels
from .syntax import Rule, Shape, Table
from .updates import biases_of, updates_of


def format_of(table: Table) -> Format:
    """The table as a Format."""
    can_write = {rule.role for rule in table.rules if rule.write} >= {"lora_A", "lora_B"}
    writer = partial(_write, table) if can_write else None
    return Format(table.name, table.about, partial(_sniff, table), partial(_read, table), writer, example=table.example)


def _sniff(table: Table, checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors
    config = checkpoint.metadata.get("adapter_config")
    if table.config:
        return isinstance(config, Mapping) and all(config.get(k) == v for k, v in table.config.items())
    if config is not None or not table.require:
        return False
    return all(any(p.search(n) for n in names) for p in table.require) and not any(
        p.search(n) for p in table.forbid for n in names
    )


def _read(table: Table, checkpoint: Checkpoint, given: Given) -> Reading:
    reader = Reader(table, checkpoint, given)
    modules, rest, left_out = sort(table, checkpoint)
    if not modules:
        raise InputError(
            f"No key of the file is one of format '{table.name}': {', '.join(list(checkpoint.tensors)[:3])}."
        )
    for module in modules:
        check_present(reader, module)
    find_weights(reader, modules)
    for module in modules:
        measure(reader, module)
    decide_orientation(reader, modules)
    decide_square(reader, modules)
    refuse_leftovers(reader, modules, rest)
    check_axis(reader)
    updates = [update for module in modules for update in updates_of(reader, module)]
    check_flags(reader, modules)
    base = _base(table, modules, rest, checkpoint) if any("base" in m.keys for m in modules) else None
    replaced: dict[str, Replacement] = {}
    if table.unmatched == "replace":
        replaced = {
            new: Replacement(ref(checkpoint, old), shared=True) for new, old in once(new_names(table, rest)).items()
        }
    elif table.unmatched == "ignore":
        left_out |= dict.fromkeys(rest, "not of this format")
    elif rest:
        raise InputError(f"{len(rest)} keys are not of format '{table.name}' (first: {rest[0]}).")
    for module in modules:  # trained with the adapter, or frozen: then it is the base's, and replacing it does nothing
        if "bias" in module.keys:
            found_biases = biases_of(reader, module)
            twice = replaced.keys() & found_biases.keys()
            if twice:
                raise InputError(f"{module.keys['bias'][0]} and another key are both {min(twice)}: which one counts?")
            replaced |= found_biases
    config = checkpoint.metadata.get("adapter_config")
    model = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
    adapter = Adapter(
        tuple(updates),
        replaced,
        model if isinstance(model, str) else None,
        format=table.name,
        notes=(*rank_notes(reader, modules), *reader.notes, *filter(None, (reader.overridden, reader.doubt))),
    )
    merged = {"eval": True, "train": False, None: None}[given.saved_in] if table.merges_on_eval and base else False
    return Reading(adapter, left_out, base, merged, reader.doubt)


def _base(table: Table, modules: Sequence[Module], rest: Iterable[str], checkpoint: Checkpoint) -> Checkpoint | None:
    """The base that came in the same file, under the network's plain names."""
    if any(fused.into and fused.pattern.fullmatch(m.path) for m in modules for fused in table.fused):
        return None  # its fused weights are not those of the network that the parts belong to
    own = [(f"{m.path}.weight", m.keys["base"][0]) for m in modules if "base" in m.keys]
    own += [(f"{m.path}.bias", m.keys["bias"][0]) for m in modules if "bias" in m.keys]
    sources = once([*own, *new_names(table, rest)])
    order = {old: i for i, old in enumerate(checkpoint.tensors)}
    ordered = sorted(sources.items(), key=lambda item: order[item[1]])
    return View(
        {new: (checkpoint, old) for new, old in ordered},
        {new: checkpoint.tensors[old] for new, old in ordered},
        {"config": checkpoint.metadata.get("config", {})},
    )


def _writable(table: Table, kind: str) -> Shape | None:
    """The layout under which plain factors of a kind of layer can be written: the first without parts or cuts."""
    for layout in table.layouts:
        a, b = (layout.dims.get(role, ()) for role in ("lora_A", "lora_B"))
        plain = all(set(labels(dim)) <= {"in", "kernel"} or dim in ("rank", "out") for dim in (*a, *b))
        if layout.kind == kind and plain:
            return layout
    return None


def _write(table: Table, adapter: Adapter, target: Target) -> Written:
    """The adapter under the table's keys. Raises TargetError for what the table has no key or no rule for."""
    rules = {rule.role: rule for rule in reversed(table.rules) if rule.write}
    refs: dict[str, Ref] = {}
    alpha_key = next((source.partition(":")[2] for source in table.alpha if source.startswith("config:")), None)
    largest = max((u.delta.rank for u in adapter.updates if isinstance(u.delta, LowRank)), default=1)
    for update in adapter.updates:
        delta, m, layout = update.delta, update.magnitude, _writable(table, update.kind)
        if layout is None or update.bias is not None or not isinstance(delta, LowRank | Unchanged):
            raise TargetError(
                f"{update.module}: format '{table.name}' does not hold such an update ({update.kind}"
                f"{', with a bias of its own' if update.bias else ''}). A dense merge keeps it exactly."
            )
        if isinstance(delta, LowRank) and "alpha" in rules:
            _put(
                refs, _key(rules["alpha"], update.module), _number_of(delta.scaling / told_scale(table, delta.rank, 1))
            )
        if isinstance(delta, LowRank):
            # the factor carries the scaling: alpha is not recorded, or one number for all ranks
            told = told_scale(table, delta.rank, largest if alpha_key else None)
            b = delta.lora_B if "alpha" in rules else delta.lora_B.times(delta.scaling / told)
            for role, promise, first in (("lora_A", delta.lora_A, True), ("lora_B", b, False)):
                dims = layout.dims.get(role, ())
                as_is = not dims or (dims[0] == "rank") == first
                _put(refs, _key(rules[role], update.module), promise if as_is else promise.T)
        if m is None:
            if table.dora:
                raise TargetError(f"{update.module} has no magnitude, which format '{table.name}' requires.")
            continue
        rule, dims = rules.get("magnitude"), layout.dims.get("magnitude", ())
        recipe = (m.eps, m.scales_bias) == (table.eps, table.scales_bias) and (
            not m.eps or m.eps_rule == table.eps_rule
        )
        if rule is None or ("in" if "in" in dims else "out") != m.axis or not recipe:
            held = "in" if "in" in dims else "out"
            why = (
                f"a magnitude for each {m.axis}put"
                if rule is None or held != m.axis
                else f"a bias that is {'' if m.scales_bias else 'not '}scaled"
                if m.scales_bias != table.scales_bias
                else f"an eps of {m.eps:g} in its norm"
            )
            raise TargetError(
                f"{update.module} is DoRA with {why}, which format '{table.name}' does not hold. A dense merge keeps "
                "it exactly."
            )
        shape = tuple(1 if label == "1" else -1 for label in dims)
        _put(refs, _key(rule, update.module), m.vector.reshape(*shape) if len(shape) > 1 else m.vector)
    if adapter.replaced and table.unmatched != "replace":
        raise TargetError(f"Format '{table.name}' has no place for {min(adapter.replaced)}, which was trained whole.")
    for name, replacement in adapter.replaced.items():
        if not (replacement.shared or replacement.alone) and may_be_tied(name):
            raise TargetError(
                f"{name} was trained as a copy beside the base's; format '{table.name}' would make it the base's own, "
                "and change what is tied to it too. Give --base to show that nothing is, or merge."
            )
        _put(refs, _replaced_key(rules, name, adapter), replacement.tensor)
    _check_again(table, adapter, refs)
    if alpha_key:
        config = {**table.config, "r": largest, alpha_key: largest, "base_model_name_or_path": adapter.base_model}
        config["target_modules"] = sorted({u.module.rpartition(".")[2] for u in adapter.updates})
        text = json.dumps(config, indent=2, sort_keys=True).encode()
        return Written(Tensors(refs), table.file, {"adapter_config.json": text})
    if "alpha" in rules or any(source.startswith("literal:") for source in table.alpha):
        ambiguous = len(table.scale_rules) > 1
        notes = (f"Written for --scale-rule {table.scale_rules[0]}.",) if ambiguous else ()
        return Written(Tensors(refs), table.file, notes=notes)
    note = {"alpha": "alpha = 1", "one": "", "rslora": "alpha = √rank"}.get(table.scale_rules[0], "alpha = rank")
    notes = (f"The scaling is in lora_B: use it with {note}, a scaling of 1 (--scaling 1).",) if note else ()
    return Written(Tensors(refs), table.file, notes=notes)


def _check_again(table: Table, adapter: Adapter, refs: Mapping[str, Ref]) -> None:
    """That the table reads every key back as what it was written for. Raises TargetError."""
    modules, rest, _ = sort(table, Tensors(refs))
    found = {(m.path, role) for m in modules for role in m.keys} | {(table.renamed(key), "") for key in rest}
    wanted = set[tuple[str, str]]()
    with_alpha = ["alpha"] if any(rule.role == "alpha" and rule.write for rule in table.rules) else []
    for update in adapter.updates:
        roles = ("lora_A", "lora_B", *with_alpha) if isinstance(update.delta, LowRank) else ()
        wanted |= {(update.module, role) for role in (*roles, *(("magnitude",) if update.magnitude else ()))}
    paths = {update.module for update in adapter.updates}
    with_bias = any(rule.role == "bias" and rule.write for rule in table.rules)
    for name in adapter.replaced:
        module, _, parameter = name.rpartition(".")
        wanted.add((module, "bias") if with_bias and parameter == "bias" and module in paths else (name, ""))
    lost = found ^ wanted
    if lost:
        raise TargetError(f"{min(lost)[0]} cannot be written so that format '{table.name}' reads the same name back.")


def _number_of(value: float) -> Ref:
    def fetch() -> Any:
        import torch

        return torch.tensor(value)

    return Ref((), "F32", fetch, "alpha")


def _put(refs: dict[str, Ref], key: str, promise: Ref) -> None:
    if key in refs:
        raise TargetError(f"Two tensors would both be written as {key}: the table's keys do not tell them apart.")
    refs[key] = promise


def _replaced_key(rules: Mapping[str, Rule], name: str, adapter: Adapter) -> str:
    """Where a tensor trained whole stands: the bias of an adapted module under the table's own key for it."""
    module, _, parameter = name.rpartition(".")
    if parameter == "bias" and "bias" in rules and any(update.module == module for update in adapter.updates):
        return _key(rules["bias"], module)
    return _key(rules["replace"], name) if "replace" in rules else name


def _key(rule: Rule, module: str) -> str:
    assert rule.write is not None
    return rule.write.replace("{module}", module)
