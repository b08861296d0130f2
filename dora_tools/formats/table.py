"""Formats that are tables: key rules with named groups, dimension labels, a scale rule. Shipped as TOML or the user's.

A table says what each key is and how its dimensions are called; orientation, rank and the magnitude's axis follow from
the labels, so no flag can contradict them. The same rules are read in both directions. See ``tables/*.toml`` and the
README for the keys of a table.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from ..adapter import Adapter, Axis, Delta, EpsRule, LowRank, Magnitude, Replacement, Unchanged, Update
from ..checkpoint import Checkpoint, Ref, Tensors, View, ref, tiles
from ..errors import InputError, TargetError, UnsupportedError
from . import SCALE_RULES, Format, Given, Reading, Written

_ROLES = {"lora_A", "lora_B", "magnitude", "base", "bias", "alpha", "ignore", "replace"}
_SOURCES = {"hparam": "hyper_parameters.{}", "config": "adapter_config.{}"}
_LABELS = {"in", "out", "rank", "1"}
_KEYS = {
    "": {
        "name",
        "about",
        "version",
        "file",
        "detect",
        "key",
        "refuse",
        "rename",
        "scaling",
        "dora",
        "unmatched",
        "example",
    },
    "detect": {"require", "forbid", "config"},
    "key": {"match", "role", "dims", "write", "reason"},
    "refuse": {"role", "dims", "reason"},
    "rename": {"match", "to"},
    "scaling": {"rule", "alpha"},
    "dora": {"eps", "eps_rule", "bias", "required"},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of key. ``write`` is the key with ``{module}`` in it, for writing; None where it is only read."""

    pattern: re.Pattern[str]
    role: str
    dims: tuple[str, ...]
    write: str | None
    reason: str


@dataclass(frozen=True)
class Table:
    """A parsed table; see the module's docstring for what it means."""

    name: str
    about: str
    rules: tuple[Rule, ...]
    require: tuple[re.Pattern[str], ...]
    forbid: tuple[re.Pattern[str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    refuse: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    rename: tuple[tuple[re.Pattern[str], str], ...] = ()
    scale_rules: tuple[str, ...] = SCALE_RULES
    alpha: tuple[str, ...] = ()
    eps: float = 0.0
    eps_rule: EpsRule = "add"
    scales_bias: bool = False
    dora: bool | None = None
    unmatched: str = "replace"
    file: str = "adapter.safetensors"

    def format(self) -> Format:
        """The table as a Format."""
        can_write = {rule.role for rule in self.rules if rule.write} >= {"lora_A", "lora_B"}
        writer = partial(_write, self) if can_write else None
        return Format(self.name, self.about, partial(_sniff, self), partial(_read, self), writer)


def load(path: Path) -> Table:
    """A user's table. Raises InputError with the place of what is wrong in it."""
    try:
        return parse(tomllib.loads(path.read_text()), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as TOML: {error}.") from error


def parse(data: Mapping[str, Any], where: str) -> Table:
    """A table from its parsed TOML. Raises InputError for unknown keys, labels and roles, and for broken patterns."""
    _check_keys(data, "", where)
    for section in ("detect", "scaling", "dora"):
        _check_keys(data.get(section, {}), section, where)
    for section in ("key", "refuse", "rename"):
        for entry in data.get(section, []):
            _check_keys(entry, section, where)
    rules = tuple(_rule(entry, where) for entry in data.get("key", []))
    if not {"lora_A", "lora_B"} <= {rule.role for rule in rules}:
        raise InputError(f"{where}: a table needs [[key]] rules for the roles lora_A and lora_B.")
    scaling, dora = data.get("scaling", {}), data.get("dora", {})
    given_rules = scaling.get("rule", list(SCALE_RULES))
    scale_rules = tuple([given_rules] if isinstance(given_rules, str) else given_rules)
    unknown = set(scale_rules) - set(SCALE_RULES)
    if unknown:
        raise InputError(f"{where}: scaling.rule knows {', '.join(SCALE_RULES)}, not {', '.join(sorted(unknown))}.")
    detect = data.get("detect", {})
    return Table(
        str(data.get("name", Path(where).stem)),
        str(data.get("about", "a custom format")),
        rules,
        tuple(_pattern(text, where) for text in detect.get("require", [])),
        tuple(_pattern(text, where) for text in detect.get("forbid", [])),
        detect.get("config", {}),
        tuple((r["role"], tuple(r["dims"]), r["reason"]) for r in data.get("refuse", [])),
        tuple((_pattern(r["match"], where), str(r["to"])) for r in data.get("rename", [])),
        scale_rules,
        tuple(scaling.get("alpha", [])),
        float(dora.get("eps", 0.0)),
        "clamp" if dora.get("eps_rule") == "clamp" else "add",
        dora.get("bias") == "scaled",
        dora.get("required"),
        _policy(data.get("unmatched", "replace"), where),
        str(data.get("file", "adapter.safetensors")),
    )


def _policy(text: Any, where: str) -> str:
    if text not in ("replace", "ignore", "refuse"):
        raise InputError(f"{where}: unmatched is replace (trained whole), ignore or refuse, not {text!r}.")
    return str(text)


def _check_keys(entry: Mapping[str, Any], section: str, where: str) -> None:
    unknown = set(entry) - _KEYS[section]
    if unknown:
        place = f"[{section}]" if section else "the table"
        raise InputError(f"{where}: {place} has no '{min(unknown)}'; it may have {', '.join(sorted(_KEYS[section]))}.")


def _pattern(text: str, where: str) -> re.Pattern[str]:
    if len(text) > 500:
        raise InputError(f"{where}: a pattern of {len(text)} characters is too long (500).")
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"{where}: the pattern '{text}' is broken: {error}.") from error


def _rule(entry: Mapping[str, Any], where: str) -> Rule:
    role, text = entry.get("role"), entry.get("match")
    if role not in _ROLES or not isinstance(text, str):
        raise InputError(f"{where}: a [[key]] needs match and a role of {', '.join(sorted(_ROLES))}, not {role!r}.")
    dims = tuple(entry.get("dims", ()))
    bad = set(dims) - _LABELS
    if bad:
        raise InputError(f"{where}: '{text}' has the dimension '{min(bad)}'; known are {', '.join(sorted(_LABELS))}.")
    pattern = _pattern(text, where)
    if "module" not in pattern.groupindex and role not in {"ignore", "replace"}:
        raise InputError(f"{where}: '{text}' needs a group (?P<module>…) that says which module the key belongs to.")
    write = entry.get("write") or _template(text)
    return Rule(pattern, str(role), dims, write, str(entry.get("reason", "")))


def _template(text: str) -> str | None:
    """The key to write for a pattern that is ``(?P<module>.+)`` and plain characters."""
    head, rest = "(?P<module>.+)", text.removesuffix("$")
    if not rest.startswith(head):
        return None
    tail = rest.removeprefix(head)
    plain = re.sub(r"\\(.)", r"\1", tail)
    return "{module}" + plain if re.escape(plain) == re.sub(r"\\?([_])", r"\1", tail) else None


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


@dataclass
class _Module:
    """The keys of one module by role, and its sizes by label."""

    keys: dict[str, tuple[str, Rule]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def _read(table: Table, checkpoint: Checkpoint, given: Given) -> Reading:
    modules, rest, left_out = _sort(table, checkpoint)
    adapted = {path: m for path, m in modules.items() if m.keys.keys() & {"lora_A", "lora_B", "magnitude"}}
    if not adapted:
        raise InputError(
            f"No key of the file is one of format '{table.name}': {', '.join(list(checkpoint.tensors)[:3])}."
        )
    for path, module in adapted.items():
        _measure(table, path, module, checkpoint)
    axis_known = _decide_square(table, adapted, checkpoint, given)
    updates = [_update(table, path, module, checkpoint, given) for path, module in adapted.items()]
    base = _base(table, modules, rest, checkpoint) if any("base" in m.keys for m in adapted.values()) else None
    replaced: dict[str, Replacement] = {}
    rest += [key for path, m in modules.items() if path not in adapted for key, _ in m.keys.values()]
    if table.unmatched == "replace":
        replaced = {_renamed(table, name): Replacement(ref(checkpoint, name), shared=True) for name in rest}
    elif table.unmatched == "ignore":
        left_out |= dict.fromkeys(rest, "not of this format")
    elif rest:
        raise InputError(f"{len(rest)} keys are not of format '{table.name}' (first: {rest[0]}).")
    notes = tuple(axis_known)
    config = checkpoint.metadata.get("adapter_config")
    model = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
    adapter = Adapter(
        tuple(updates), replaced, model if isinstance(model, str) else None, format=table.name, notes=notes
    )
    return Reading(adapter, left_out, base)


def _sort(table: Table, checkpoint: Checkpoint) -> tuple[dict[str, _Module], list[str], dict[str, str]]:
    """Every key to a module's role, to the rest, or to what is left out."""
    modules: dict[str, _Module] = {}
    rest: list[str] = []
    left_out: dict[str, str] = {}
    for key in checkpoint.tensors:
        rule, match = next(((r, m) for r in table.rules if (m := r.pattern.fullmatch(key))), (None, None))
        if rule is None or match is None or rule.role == "replace":
            rest.append(key)
        elif rule.role == "ignore":
            left_out[key] = rule.reason or "not a weight"
        else:
            module = modules.setdefault(_renamed(table, match["module"]), _Module())
            if rule.role in module.keys:
                raise InputError(
                    f"{key} and {module.keys[rule.role][0]} are both the {rule.role} of {match['module']}."
                )
            module.keys[rule.role] = key, rule
    return modules, rest, left_out


def _renamed(table: Table, name: str) -> str:
    for pattern, to in table.rename:
        name = pattern.sub(to, name)
    return name


def _fits(shape: Sequence[int], dims: Sequence[str], sizes: dict[str, int]) -> bool:
    """Whether a shape can be these dimensions, given the sizes known so far; adds what it tells."""
    if len(shape) != len(dims):
        return False
    told = {**sizes}
    for n, label in zip(shape, dims, strict=True):
        if told.setdefault(label, 1 if label == "1" else n) != n:
            return False
    sizes.update(told)
    return True


def _measure(table: Table, path: str, module: _Module, checkpoint: Checkpoint) -> None:
    """Check every shape of a module against its labels. What the table refuses by shape is refused with its reason."""
    missing = {"lora_A", "lora_B"} - module.keys.keys()
    if len(missing) == 1:
        raise InputError(f"{path} has {', '.join(key for key, _ in module.keys.values())}, but no {min(missing)}.")
    for role in ("base", "lora_A", "lora_B", "magnitude", "bias"):
        if role not in module.keys:
            continue
        key, rule = module.keys[role]
        shape = checkpoint.tensors[key].shape
        if 0 in shape:
            raise InputError(f"{key} is empty (shape {list(shape)}): saved under ZeRO-3 or FSDP without gathering.")
        if rule.dims and not _fits(shape, rule.dims, module.sizes):
            for refused, dims, reason in table.refuse:
                if refused == role and _fits(shape, dims, {**module.sizes}):
                    raise UnsupportedError(f"{key} has shape {list(shape)}: {reason}")
            known = ", ".join(f"{label} = {n}" for label, n in module.sizes.items() if label != "1")
            raise InputError(
                f"{key} has shape {list(shape)}, but format '{table.name}' has ({', '.join(rule.dims)}) there, and the "
                f"other tensors of {path} say {known}."
            )


def _decide_square(table: Table, modules: Mapping[str, _Module], checkpoint: Checkpoint, given: Given) -> Iterable[str]:
    """Where inputs and outputs are equally many, a refused shape looks like a good one: decide once for the file."""
    for role, dims, reason in table.refuse:
        doubtful = []
        for path, module in modules.items():
            if role in module.keys:
                shape = checkpoint.tensors[module.keys[role][0]].shape
                doubtful.append(path)
                if not _fits(shape, dims, {**module.sizes}):
                    return []  # this one can only be what the table reads, and a file is of one kind
        if not doubtful or given.magnitude_axis is not None:
            return []
        if _look_like_norms([modules[path] for path in doubtful[:4]], role, checkpoint):
            return [f"All layers are square; the {role}s match the norms of the base's columns, so they are those."]
        raise InputError(
            f"All layers are square, so {modules[doubtful[0]].keys[role][0]} may be what '{table.name}' stores, or: "
            f"{reason} If it is one magnitude for each input, say --magnitude-axis in."
        )
    return []


def _look_like_norms(modules: Iterable[_Module], role: str, checkpoint: Checkpoint) -> bool:
    """Whether the magnitudes are nearer to the column norms of the weights beside them than to ones, clearly.

    DoRA's begin as those norms, the other layer's as ones, and training moves either only a little.
    """
    from_norms = from_ones = 0.0
    for module in modules:
        if "base" not in module.keys:
            return False
        m = ref(checkpoint, module.keys[role][0]).load().flatten()
        weight = module.keys["base"][0]
        squares = [checkpoint.read(weight, *rows).square().sum(0) for rows in tiles(checkpoint.tensors[weight])]
        norms = sum(squares[1:], start=squares[0]).sqrt()
        from_norms += float((m - norms).abs().mean())
        from_ones += float((m - 1).abs().mean())
    return from_norms < 0.5 * from_ones


def _oriented(checkpoint: Checkpoint, key: str, dims: Sequence[str], wanted: tuple[str, str]) -> Ref:
    promise = ref(checkpoint, key)
    return promise if not dims or tuple(dims) == wanted else promise.T


def _update(table: Table, path: str, module: _Module, checkpoint: Checkpoint, given: Given) -> Update:
    sizes = module.sizes
    delta: Delta
    if "lora_A" in module.keys:
        (a, a_rule), (b, b_rule) = module.keys["lora_A"], module.keys["lora_B"]
        scaling, source = _scaling(table, checkpoint, given, sizes["rank"], module, path)
        delta = LowRank(
            _oriented(checkpoint, a, a_rule.dims, ("rank", "in")),
            _oriented(checkpoint, b, b_rule.dims, ("out", "rank")),
            scaling,
            source,
        )
    else:
        delta = Unchanged((sizes.get("out", -1), sizes.get("in", -1)))
    magnitude = None
    if "magnitude" in module.keys:
        key, rule = module.keys["magnitude"]
        axis: Axis = "in" if "in" in rule.dims else "out"
        vector = ref(checkpoint, key).reshape(-1)
        magnitude = Magnitude(vector, axis, table.eps, table.eps_rule, table.scales_bias)
    elif table.dora:
        raise InputError(f"{path} has no magnitude, which every module of format '{table.name}' has: was it dropped?")
    return Update(path, delta, magnitude)


def _scaling(
    table: Table, checkpoint: Checkpoint, given: Given, rank: int, module: _Module, path: str
) -> tuple[float, str]:
    """The number that is multiplied, and where it comes from. Raises InputError where the file does not say."""
    if given.scaling is not None:
        return given.scaling, "--scaling"
    rule = given.scale_rule or (table.scale_rules[0] if len(table.scale_rules) == 1 else None)
    attributes = _attributes(checkpoint, module)
    if rule is None and given.alpha is None and "alpha" in attributes:
        # of a pickled module: the class that divides by the rank keeps it, the one that does not has no use for it
        rule = "alpha/rank" if "rank" in attributes else "alpha"
    if rule == "one":
        return 1.0, f"1, the rule of {table.name}" if given.scale_rule is None else "--scale-rule one"
    alpha, source = _alpha(table, checkpoint, given, module)
    options = " or ".join(f"--scale-rule {r}" for r in table.scale_rules)
    if alpha is None:
        raise InputError(
            f"{path}: the file does not record alpha, on which the scale of this adapter (rank {rank}) depends. Say "
            f"--alpha{'' if rule else f' and {options}'}, or --scaling with the number that is multiplied."
        )
    if rule is None:
        numbers = {"alpha": alpha, "alpha/rank": alpha / rank, "rslora": alpha / sqrt(rank), "one": 1.0}
        means = ", ".join(f"{r} gives {numbers[r]:g}" for r in table.scale_rules)
        raise InputError(
            f"{path}: alpha is {alpha:g} ({source}), but nothing in the file says how '{table.name}' scales with it: "
            f"{means}. Say {options}."
        )
    if rule == "alpha":
        return alpha, f"alpha, {source}"
    return alpha / (sqrt(rank) if rule == "rslora" else rank), f"{alpha:g}/{'√' * (rule == 'rslora')}{rank}, {source}"


def _attributes(checkpoint: Checkpoint, module: _Module) -> Mapping[str, Any]:
    """What a pickled module remembers beside lora_A."""
    path = module.keys["lora_A"][0].rpartition(".")[0]
    found: Mapping[str, Any] = checkpoint.metadata.get("attributes", {}).get(path, {})
    return found


def _alpha(table: Table, checkpoint: Checkpoint, given: Given, module: _Module) -> tuple[float | None, str]:
    if given.alpha is not None:
        return given.alpha, "--alpha"
    attribute = _attributes(checkpoint, module).get("alpha")
    if isinstance(attribute, int | float):
        return float(attribute), "alpha of the pickled module"
    if "alpha" in module.keys:
        key = module.keys["alpha"][0]
        return float(ref(checkpoint, key).load().item()), key
    hparams = checkpoint.metadata.get("hyper_parameters", {})
    for source in table.alpha:
        kind, _, name = source.partition(":")
        place = hparams if kind == "hparam" else checkpoint.metadata.get("adapter_config") if kind == "config" else {}
        value = place.get(name) if isinstance(place, Mapping) else None
        if kind == "literal":
            value = float(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value), {"hparam": f"hyper_parameters.{name}", "config": f"adapter_config.{name}"}.get(
                kind, f"the table's {name}"
            )
    return None, ""


def _base(table: Table, modules: Mapping[str, _Module], rest: Iterable[str], checkpoint: Checkpoint) -> Checkpoint:
    """The base that came in the same file, under the network's plain names."""
    sources = {f"{path}.weight": m.keys["base"][0] for path, m in modules.items() if "base" in m.keys}
    sources |= {f"{path}.bias": m.keys["bias"][0] for path, m in modules.items() if "bias" in m.keys}
    sources |= {_renamed(table, name): name for name in rest}
    order = {old: i for i, old in enumerate(checkpoint.tensors)}
    ordered = sorted(sources.items(), key=lambda item: order[item[1]])
    return View(
        {new: (checkpoint, old) for new, old in ordered},
        {new: checkpoint.tensors[old] for new, old in ordered},
        {"config": checkpoint.metadata.get("config", {})},
    )


def _write(table: Table, adapter: Adapter) -> Written:
    """The adapter under the table's keys. Raises TargetError for what the table has no key or no rule for."""
    rules = {rule.role: rule for rule in reversed(table.rules) if rule.write}
    refs: dict[str, Ref] = {}
    alpha_key = next((source.partition(":")[2] for source in table.alpha if source.startswith("config:")), None)
    largest = max((u.delta.rank for u in adapter.updates if isinstance(u.delta, LowRank)), default=1)
    for update in adapter.updates:
        delta, m = update.delta, update.magnitude
        if update.kind != "linear" or update.bias is not None or not isinstance(delta, LowRank | Unchanged):
            raise TargetError(f"{update.module}: format '{table.name}' holds low-rank updates of linear layers only.")
        if isinstance(delta, LowRank):
            # the factor carries the scaling: alpha is not recorded, or one number for all ranks
            b = delta.lora_B.times(delta.scaling * (delta.rank / largest if alpha_key else 1))
            for role, promise, order in (("lora_A", delta.lora_A, ("rank", "in")), ("lora_B", b, ("out", "rank"))):
                rule = rules[role]
                refs[_key(rule, update.module)] = promise if rule.dims in ((), order) else promise.T
        if m is None:
            if table.dora:
                raise TargetError(f"{update.module} has no magnitude, which format '{table.name}' requires.")
            continue
        rule = rules.get("magnitude", rules["lora_A"])
        axis = "in" if "in" in rule.dims else "out"
        recipe = (m.eps, m.scales_bias) == (table.eps, table.scales_bias)
        if rule.role != "magnitude" or axis != m.axis or not recipe:
            raise TargetError(
                f"{update.module} is DoRA with a magnitude for each {m.axis}put, which format '{table.name}' does not "
                "hold. A dense merge keeps it exactly."
            )
        shape = tuple(1 if label == "1" else -1 for label in rule.dims)
        refs[_key(rule, update.module)] = m.vector.reshape(*shape) if len(shape) > 1 else m.vector
    if adapter.replaced and table.unmatched != "replace":
        raise TargetError(f"Format '{table.name}' has no place for {min(adapter.replaced)}, which was trained whole.")
    refs |= {name: replacement.tensor for name, replacement in adapter.replaced.items()}
    if alpha_key:
        config = {**table.config, "r": largest, alpha_key: largest, "base_model_name_or_path": adapter.base_model}
        config["target_modules"] = sorted({u.module.rpartition(".")[2] for u in adapter.updates})
        text = json.dumps(config, indent=2, sort_keys=True).encode()
        return Written(Tensors(refs), table.file, {"adapter_config.json": text})
    note = {"alpha": "alpha = 1", "one": "", "rslora": "alpha = √rank"}.get(table.scale_rules[0], "alpha = rank")
    notes = (f"The scaling is in lora_B: use it with {note}, a scaling of 1.",) if note else ()
    return Written(Tensors(refs), table.file, notes=notes)


def _key(rule: Rule, module: str) -> str:
    assert rule.write is not None
    return rule.write.replace("{module}", module)


def suggest(checkpoint: Checkpoint, name: str) -> str:
    """A starter table for an unknown file: its kinds of keys, with what their names and shapes suggest.

    What is a guess is marked; scale and what is left open must be filled in by whoever knows the trainer.
    """
    cuts = {key: next((i for i, p in enumerate(key.split(".")) if _HINT.search(p)), 0) for key in checkpoint.tensors}
    adapted = {".".join(key.split(".")[:cut]) for key, cut in cuts.items() if cut}
    kinds: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        parts = key.split(".")
        module = next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in adapted), "")
        tail = key.removeprefix(f"{module}.") if module else f"(not of an adapted module).{parts[-1]}"
        kinds.setdefault(tail, []).append(key)
    lines = [f'name = "{name}"', 'about = "what wrote this"', ""]
    for tail, keys in kinds.items():
        shape = checkpoint.tensors[keys[0]].shape
        if tail.startswith("("):
            lines += [
                f"# {len(keys)} keys like {keys[0]}, shape {list(shape)}: of no adapted module, taken as they are",
                "",
            ]
            continue
        role, dims = _guess(tail, shape)
        lines += [
            f"# {len(keys)} keys like {keys[0]}, shape {list(shape)}",
            "[[key]]",
            f"match = '(?P<module>.+)\\.{re.escape(tail)}'",
            f'role = "{role}"' + ("" if dims else "  # or: alpha, replace (a tensor trained whole)"),
        ]
        lines += [f"dims = {json.dumps(dims)}  # check"] if dims else []
        lines.append("")
    lines += ["[scaling]", 'rule = ["alpha", "alpha/rank", "rslora", "one"]  # keep the one that the trainer uses', ""]
    return "\n".join(lines)


_HINT = re.compile(r"lora|dora|magnitude|adapter|^m$", re.IGNORECASE)


def _guess(tail: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """A role and dimensions: lora_A and lora_B by the name's letter or direction, m by its name, the base by weight."""
    low = tail.lower()
    if re.search(r"(_|\b)(a|down|in|0)(\.weight)?$", low) and len(shape) == 2:
        return "lora_A", ("rank", "in") if shape[0] <= shape[1] else ("in", "rank")
    if re.search(r"(_|\b)(b|up|out|1)(\.weight)?$", low) and len(shape) == 2:
        return "lora_B", ("out", "rank") if shape[1] <= shape[0] else ("rank", "out")
    if "magnitude" in low or low.split(".")[0] in {"m", "dora_scale", "dora_m", "lora_m"}:
        return "magnitude", ("1", "in") if shape[:1] == (1,) else ("out", "1") if shape[1:] == (1,) else ("out",)
    if low.endswith("weight") and len(shape) == 2:
        return "base", ("out", "in")
    return ("bias", ("out",)) if low.endswith("bias") else ("ignore", ())


def _shipped() -> list[Format]:
    folder = files(__package__) / "tables"
    found = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml"))
    return [parse(tomllib.loads((folder / name).read_text()), name).format() for name in found]


FORMATS = _shipped()
