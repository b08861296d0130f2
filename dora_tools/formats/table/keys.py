"""Which key of a file is what: every one to a module's role, to the rest, or left out; nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...checkpoint import Checkpoint, Ref
from ...errors import InputError, UnsupportedError, UsageError
from ...names.patterns import ADAPTER_PART
from .. import Given
from .syntax import SHAPED, Rule, Shape, Table


@dataclass
class Module:
    """The keys of one module by role, its base weight where that is known, and what its shapes say."""

    path: str
    keys: dict[str, tuple[str, Rule]] = field(default_factory=dict)
    weight: Ref | None = None
    biased: bool = False
    layout: Shape | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    square: bool = False  # its weight may be stored either way
    turned: bool | None = None


@dataclass
class Reader:
    """One reading: the table, the file, and what the user says."""

    table: Table
    checkpoint: Checkpoint
    given: Given
    doubt: str = ""
    overridden: str = ""
    notes: list[str] = field(default_factory=list)

    def shape(self, role: str, module: Module) -> tuple[int, ...]:
        return self.checkpoint.tensors[module.keys[role][0]].shape

    def settings(self) -> dict[str, Any]:
        """What is written down beside the tensors and the base: where row counts and the like are looked up."""
        found: dict[str, Any] = {}
        base = self.given.base() if self.given.base else None
        for source in (base.metadata.get("config") if base else None, self.checkpoint.metadata.get("config"),
                       self.checkpoint.metadata.get("adapter_config"),
                       self.checkpoint.metadata.get("hyper_parameters")):  # fmt: skip
            found |= source if isinstance(source, Mapping) else {}
        return found


def sort(table: Table, checkpoint: Checkpoint) -> tuple[list[Module], list[str], dict[str, str]]:
    """Every key to an adapted module's role, to the rest, or to what is left out."""
    matches = {key: [(r, m) for r in table.rules if (m := r.pattern.fullmatch(key))] for key in checkpoint.tensors}
    modules: dict[str, Module] = {}
    for candidates in matches.values():
        for rule, match in candidates[:1]:
            if rule.role in ("lora_A", "lora_B", "magnitude"):
                path = table.renamed(match["module"])
                modules.setdefault(path, Module(path))
    rest: list[str] = []
    left_out: dict[str, str] = {}
    for key, candidates in matches.items():
        for rule, match in candidates:
            if rule.role == "ignore":
                left_out[key] = rule.reason or "not a weight"
                break
            if rule.role == "replace":
                rest.append(key)
                break
            path = table.renamed(match["module"])
            if path not in modules:
                continue  # a weight, bias or alpha of a module that is not adapted
            module = modules[path]
            if rule.role in module.keys:
                raise InputError(f"{key} and {module.keys[rule.role][0]} are both the {rule.role} of {path}.")
            module.keys[rule.role] = key, rule
            break
        else:
            rest.append(key)
    return list(modules.values()), rest, left_out


def refuse_leftovers(reader: Reader, modules: Sequence[Module], rest: Sequence[str]) -> None:
    """Keys that no rule knows but that belong to an adapter: taken as weights, their update would be lost."""
    table, adapted = reader.table, {module.path for module in modules}
    explicit = [rule.pattern for rule in table.rules if rule.role == "replace" and rule.pattern.groups == 0]
    for key in rest:
        below = table.renamed(key).rpartition(".")[0] in adapted
        if (below or ADAPTER_PART.search(key)) and not any(pattern.fullmatch(key) for pattern in explicit):
            raise InputError(
                f"{key} belongs to an adapter, but format '{table.name}' knows no such key. If it may be ignored, or "
                "is something else, say so in a table of your own (inspect --suggest-format begins one)."
            )


def check_present(reader: Reader, module: Module) -> None:
    missing = {"lora_A", "lora_B"} - module.keys.keys()
    if len(missing) == 1 or (missing and not reader.table.magnitude_alone):
        raise InputError(f"{module.path} has {', '.join(k for k, _ in module.keys.values())}, but no {min(missing)}.")
    for role in SHAPED:
        if role in module.keys and 0 in reader.shape(role, module):
            raise InputError(
                f"{module.keys[role][0]} is empty (shape {list(reader.shape(role, module))}): saved under ZeRO-3 or "
                "FSDP without gathering."
            )


def check_axis(reader: Reader) -> None:
    """--magnitude-axis against what the table says a magnitude is."""
    table, said = reader.table, reader.given.magnitude_axis
    axes = {"in" if "in" in dims else "out" for layout in table.layouts if (dims := layout.dims.get("magnitude"))}
    if said is not None and axes and said not in axes:
        reason = next((reason for role, _, reason in table.refuse if role == "magnitude"), None)
        raise UnsupportedError(
            f"Format '{table.name}' has a magnitude for each {min(axes)}put, not for each {said}put"
            + (f"; with one for each {said}put, {reason}" if reason else ".")
        )


def check_flags(reader: Reader, modules: Sequence[Module]) -> None:
    """--enable-lora that is of no module here."""
    for end in reader.given.enable_lora:
        if end and not any(ends(module.path, end) for module in modules):
            raise UsageError(f"--enable-lora names '{end}', but no adapted module ends so.")


def ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def new_names(table: Table, names: Iterable[str]) -> list[tuple[str, str]]:
    return [(table.renamed(name), name) for name in names]


def once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """New name → old name. Raises InputError where two old ones become the same."""
    found: dict[str, str] = {}
    for new, old in pairs:
        if new in found:
            raise InputError(f"{found[new]} and {old} are both {new} in the network: which one counts?")
        found[new] = old
    return found
