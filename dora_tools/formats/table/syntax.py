"""What a table may say: its TOML as checked data. See the README for the keys, ``*.toml`` beside this for examples."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...adapter import EpsRule, Kind
from ...errors import InputError
from ...names.patterns import compiled
from .. import SCALE_RULES, Example
from .shapes import LABELS, labels

ROLES = {"lora_A", "lora_B", "magnitude", "base", "bias", "alpha", "ignore", "replace"}
SHAPED = ("base", "lora_B", "lora_A", "magnitude", "bias")  # the roles whose shapes tell sizes
_SOURCES = {"hparam", "config", "literal"}
_KEYS = {
    "": "name about version source file detect key layout refuse rename fused scaling dora unmatched test "
    "merges_on_eval",
    "detect": "require forbid config",
    "key": "match role dims write reason",
    "layout": "kind base lora_A lora_B magnitude bias square",
    "refuse": "role dims reason",
    "rename": "match to",
    "fused": "match rows enabled into",
    "scaling": "rule alpha",
    "dora": "eps eps_rule bias required alone",
    "test": "tensors base merged alpha scaling scale_rule enable_lora hparams config",
}
_LISTS = ("key", "layout", "refuse", "rename", "fused")


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of key. ``write`` is the key with ``{module}`` in it, for writing; None where it is only read."""

    pattern: re.Pattern[str]
    role: str
    dims: tuple[str, ...]
    write: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Shape:
    """One way in which a module's tensors may be laid out: role → dimensions. An empty one is not checked."""

    kind: Kind
    dims: Mapping[str, tuple[str, ...]]
    square: bool = True  # whether a square weight may be meant

    @property
    def stored_in_out(self) -> bool:
        """Whether the base has its inputs first."""
        return "in" in self.dims.get("base", ())[:1]


@dataclass(frozen=True, slots=True)
class Fused:
    """Layers that are several in one: how many rows each part has (expressions; none: all alike), which have factors.

    ``into``: the names of the parts as modules of their own, where the base keeps them apart.
    """

    pattern: re.Pattern[str]
    rows: tuple[str, ...]
    enabled: tuple[bool, ...]
    into: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A parsed table."""

    name: str
    about: str
    rules: tuple[Rule, ...]
    require: tuple[re.Pattern[str], ...]
    forbid: tuple[re.Pattern[str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    layouts: tuple[Shape, ...] = ()
    refuse: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    rename: tuple[tuple[re.Pattern[str], str], ...] = ()
    fused: tuple[Fused, ...] = ()
    scale_rules: tuple[str, ...] = SCALE_RULES
    alpha: tuple[str, ...] = ()
    eps: float = 0.0
    eps_rule: EpsRule = "add"
    scales_bias: bool = False
    dora: bool | None = None
    magnitude_alone: bool = False
    merges_on_eval: bool = False
    unmatched: str = "replace"
    file: str = "adapter.safetensors"
    example: Example | None = None

    def renamed(self, name: str) -> str:
        for pattern, to in self.rename:
            name = pattern.sub(to, name)
        return name


def load(path: Path) -> Table:
    """A user's table. Raises InputError with the place of what is wrong in it."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as TOML: {str(error) or type(error).__name__}.") from error
    try:
        return parse(data, str(path))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} has a value of a kind that is not meant there: {error}.") from error


def parse(data: Mapping[str, Any], where: str) -> Table:
    """A table from its parsed TOML. Raises InputError for unknown keys, labels and roles, and for broken patterns."""
    _check_keys(data, "", where)
    for section in _KEYS.keys() - {"", *_LISTS}:
        _check_keys(_typed(data, section, dict, {}, where), section, where)
    for section in _LISTS:
        for entry in _typed(data, section, list, [], where):
            _check_keys(entry, section, where)
    rules = tuple(_rule(entry, where) for entry in data.get("key", []))
    if not {"lora_A", "lora_B"} <= {rule.role for rule in rules}:
        raise InputError(f"{where}: a table needs [[key]] rules for the roles lora_A and lora_B.")
    scaling, dora, detect = (data.get(section, {}) for section in ("scaling", "dora", "detect"))
    return Table(
        str(data.get("name", Path(where).stem)),
        str(data.get("about", "a custom format")),
        rules,
        _patterns(detect, "require", where),
        _patterns(detect, "forbid", where),
        _typed(detect, "config", dict, {}, where),
        _layouts(data.get("layout", [{}]), rules, where),
        tuple(_refusal(entry, where) for entry in data.get("refuse", [])),
        tuple(_rename(entry, where) for entry in data.get("rename", [])),
        tuple(_fused(entry, where) for entry in data.get("fused", [])),
        _scale_rules(scaling, where),
        tuple(_source(text, where) for text in _typed(scaling, "alpha", list, [], where)),
        _eps(dora, where),
        _one_of(dora, "eps_rule", ("add", "clamp"), where),
        _one_of(dora, "bias", ("untouched", "scaled"), where) == "scaled",
        _typed(dora, "required", bool, None, where),
        _typed(dora, "alone", bool, False, where),
        _typed(data, "merges_on_eval", bool, False, where),
        _one_of(data, "unmatched", ("replace", "ignore", "refuse"), where),
        _file(data.get("file", "adapter.safetensors"), where),
        _example(data["test"], where) if "test" in data else None,
    )


def _check_keys(entry: Any, section: str, where: str) -> None:
    known = _KEYS[section].split()
    place = f"[{section}]" if section else "the table"
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: {place} must be a table, not {entry!r}.")
    unknown = entry.keys() - set(known)
    if unknown:
        raise InputError(f"{where}: {place} has no '{min(unknown)}'; it may have {', '.join(sorted(known))}.")


def _typed(entry: Mapping[str, Any], key: str, kind: Any, default: Any, where: str) -> Any:
    value = entry.get(key, default)
    if value is not default and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
        name = {dict: "a table", list: "a list", bool: "true or false", str: "text"}.get(kind, "a number")
        raise InputError(f"{where}: {key} must be {name}, not {value!r}.")
    return value


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(entry.get(key), str):
        raise InputError(f"{where}: {key} must be a text, not {entry.get(key)!r}.")
    return str(entry[key])


def _one_of(entry: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: str) -> Any:
    value = entry.get(key, allowed[0])
    if value not in allowed:
        raise InputError(f"{where}: {key} is {' or '.join(allowed)}, not {value!r}.")
    return value


def _patterns(entry: Mapping[str, Any], key: str, where: str) -> tuple[re.Pattern[str], ...]:
    return tuple(_pattern(text, where) for text in _typed(entry, key, list, [], where))


def _pattern(text: Any, where: str) -> re.Pattern[str]:
    return compiled(text, where, 6)


def _dims(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(dim, str) for dim in value):
        raise InputError(f'{where}: dims is a list of names such as ["rank", "in"], not {value!r}.')
    for dim in value:
        for label in labels(dim):
            if label not in LABELS:
                raise InputError(f"{where}: there is no dimension '{label}'; known are {', '.join(LABELS)}.")
    return tuple(value)


def _rule(entry: Mapping[str, Any], where: str) -> Rule:
    role, text = entry.get("role"), entry.get("match")
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise InputError(f"{where}: a [[key]] needs match and a role of {', '.join(sorted(ROLES))}, not {role!r}.")
    pattern = _pattern(text, where)
    if "module" not in pattern.groupindex and role not in {"ignore", "replace"}:
        raise InputError(f"{where}: '{text}' needs a group (?P<module>…) that says which module the key belongs to.")
    write = entry.get("write", _template(text))
    if write is not None and (not isinstance(write, str) or "{module}" not in write):
        raise InputError(f"{where}: write is the key with {{module}} in it, not {write!r}.")
    return Rule(pattern, role, _dims(entry.get("dims", []), where), write, str(entry.get("reason", "")))


def _template(text: str) -> str | None:
    """The key to write for a pattern that is ``(?P<module>.+)`` and plain characters."""
    head, rest = "(?P<module>.+)", text.removesuffix("$")
    if not rest.startswith(head):
        return None
    tail = rest.removeprefix(head)
    plain = re.sub(r"\\(.)", r"\1", tail)
    return "{module}" + plain if re.escape(plain) == re.sub(r"\\?([_])", r"\1", tail) else None


def _layouts(entries: list[Mapping[str, Any]], rules: tuple[Rule, ...], where: str) -> tuple[Shape, ...]:
    """The [[layout]]s, each over the dimensions of the key rules; a table without any has that one layout."""
    default = {rule.role: rule.dims for rule in reversed(rules) if rule.role in SHAPED}
    found = []
    for entry in entries or [{}]:
        dims = default | {role: _dims(entry[role], where) for role in SHAPED if role in entry}
        kernel = any(label in ("k", "kernel") for dim in dims.get("base", ()) for label in labels(dim))
        kind = _one_of(entry, "kind", ("linear", "embedding", "conv"), where) if "kind" in entry else None
        found.append(Shape(kind or ("conv" if kernel else "linear"), dims, _typed(entry, "square", bool, True, where)))
    return tuple(found)


def _rename(entry: Mapping[str, Any], where: str) -> tuple[re.Pattern[str], str]:
    pattern, to = _pattern(_text(entry, "match", where), where), _text(entry, "to", where)
    try:
        re.compile(f"(?:{pattern.pattern})|").sub(to, "")  # the empty name, so that the groups in ``to`` are looked up
    except (re.error, IndexError) as error:
        raise InputError(f"{where}: '{to}' of [[rename]] cannot be filled in: {error}.") from error
    return pattern, to


def _eps(dora: Mapping[str, Any], where: str) -> float:
    value = float(_typed(dora, "eps", int | float, 0.0, where))
    if not 0 <= value < 1:
        raise InputError(f"{where}: eps keeps a norm from 0: a small number, not {value:g}.")
    return value


def _file(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.safetensors", name):
        raise InputError(f"{where}: file is the plain name of a .safetensors file, not {name!r}.")
    return name


def _refusal(entry: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...], str]:
    return _text(entry, "role", where), _dims(entry.get("dims"), where), _text(entry, "reason", where)


def _fused(entry: Mapping[str, Any], where: str) -> Fused:
    rows = _typed(entry, "rows", list, [], where)
    enabled, into = _typed(entry, "enabled", list, [], where), _typed(entry, "into", list, [], where)
    for text in rows:
        check_expression(str(text), where)
    if not all(isinstance(flag, bool) for flag in enabled) or not all(isinstance(name, str) for name in into):
        raise InputError(f"{where}: [[fused]] enabled is a list of true and false, into a list of names.")
    if len(set(into)) < len(into):
        raise InputError(f"{where}: two parts of a [[fused]] have the same name in into.")
    counts = {len(each) for each in (rows, enabled, into) if each}
    if len(counts) > 1 or not counts:
        raise InputError(f"{where}: a [[fused]] needs rows, enabled or into, and as many of each as there are parts.")
    return Fused(
        _pattern(_text(entry, "match", where), where), tuple(str(r) for r in rows), tuple(enabled), tuple(into)
    )


def check_expression(text: str, where: str) -> ast.expr:
    """A number of rows: integers, names, + - * // and brackets. Raises InputError for anything else."""
    try:
        if len(text) > 200:
            raise SyntaxError("too long")
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: '{text:.80}' is no number of rows ({error}).") from error
    for node in ast.walk(tree):
        good = isinstance(node, ast.Name | ast.BinOp | ast.Add | ast.Sub | ast.Mult | ast.FloorDiv | ast.Load)
        if not good and not (isinstance(node, ast.Constant) and type(node.value) is int):
            raise InputError(f"{where}: '{text}' may have integers, names, + - * // and brackets only.")
    return tree


def value_of(tree: ast.expr, names: Mapping[str, Any], where: str) -> int:
    """The value of such an expression. Raises InputError for a name that is not known or no integer."""
    if isinstance(tree, ast.Constant):
        return int(str(tree.value))
    if isinstance(tree, ast.Name):
        value = names.get(tree.id)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{where}: '{tree.id}' is in no config or hyper-parameters as a whole number.")
        return value
    assert isinstance(tree, ast.BinOp)
    left, right = value_of(tree.left, names, where), value_of(tree.right, names, where)
    if isinstance(tree.op, ast.FloorDiv) and right == 0:
        raise InputError(f"{where}: a number of rows is divided by 0.")
    return (
        left + right
        if isinstance(tree.op, ast.Add)
        else left - right
        if isinstance(tree.op, ast.Sub)
        else left * right
        if isinstance(tree.op, ast.Mult)
        else left // right
    )


def _scale_rules(scaling: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = scaling.get("rule", list(SCALE_RULES))
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else (given,)
    unknown = [rule for rule in found if rule not in SCALE_RULES]
    if unknown or not found:
        raise InputError(f"{where}: scaling.rule knows {', '.join(SCALE_RULES)}, not {unknown}.")
    return found


def _source(text: Any, where: str) -> str:
    kind, _, name = str(text).partition(":")
    if kind not in _SOURCES or not name:
        raise InputError(f"{where}: a source of alpha is hparam:NAME, config:NAME or literal:NUMBER, not {text!r}.")
    if kind == "literal":
        try:
            usable = 1e-30 < abs(float(name)) < 1e30
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"{where}: '{text}' is no number that an alpha can be.")
    return str(text)


def _example(entry: Mapping[str, Any], where: str) -> Example:
    """The [test]: tensors as nested lists, and the merged weights that they must give."""
    parts = {key: _typed(entry, key, dict, {}, where) for key in ("tensors", "base", "merged", "hparams", "config")}
    if not parts["tensors"] or not parts["merged"]:
        raise InputError(f"{where}: a [test] needs tensors (key → numbers) and merged (name → numbers).")
    options: dict[str, Any] = {
        key: float(_typed(entry, key, int | float, 0, where)) for key in ("alpha", "scaling") if key in entry
    }
    if "scale_rule" in entry:
        options["scale_rule"] = _text(entry, "scale_rule", where)
    flags = _typed(entry, "enable_lora", list, None, where)
    if flags is not None:
        options["enable_lora"] = {"": tuple(bool(flag) for flag in flags)}
    return Example(parts["tensors"], parts["base"], parts["merged"], options, parts["hparams"], parts["config"])
