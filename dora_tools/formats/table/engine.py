"""Adapters by a table: its rules, layouts and recipe applied to a checkpoint, and in the other direction."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

from ...adapter import Adapter, Axis, Delta, LowRank, Magnitude, Replacement, Unchanged, Update
from ...checkpoint import Checkpoint, Ref, Tensors, View, assembled, ref, tiles
from ...errors import InputError, TargetError, UnsupportedError, UsageError
from ...names.places import found
from ...names.ties import CONV1D_LAYERS, CONV1D_MODELS, may_be_tied
from .. import Format, Given, Reading, Written
from .shapes import Equation, determined, labels, solve
from .syntax import SHAPED, Fused, Rule, Shape, Table, check_expression, value_of


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


@dataclass
class _Module:
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
class _Reader:
    """One reading: the table, the file, and what the user says."""

    table: Table
    checkpoint: Checkpoint
    given: Given
    doubt: str = ""
    notes: list[str] = field(default_factory=list)

    def shape(self, role: str, module: _Module) -> tuple[int, ...]:
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


def _read(table: Table, checkpoint: Checkpoint, given: Given) -> Reading:
    reader = _Reader(table, checkpoint, given)
    modules, rest, left_out = _sort(table, checkpoint)
    if not modules:
        raise InputError(
            f"No key of the file is one of format '{table.name}': {', '.join(list(checkpoint.tensors)[:3])}."
        )
    for module in modules:
        _check_present(reader, module)
    _find_weights(reader, modules)
    for module in modules:
        _measure(reader, module)
    _decide_orientation(reader, modules)
    _decide_square(reader, modules)
    _refuse_leftovers(reader, modules, rest)
    _check_axis(reader)
    updates = [update for module in modules for update in _updates(reader, module)]
    _check_flags(reader, modules)
    base = _base(table, modules, rest, checkpoint) if any("base" in m.keys for m in modules) else None
    replaced: dict[str, Replacement] = {}
    if table.unmatched == "replace":
        replaced = {
            new: Replacement(ref(checkpoint, old), shared=True) for new, old in _once(_new_names(table, rest)).items()
        }
    elif table.unmatched == "ignore":
        left_out |= dict.fromkeys(rest, "not of this format")
    elif rest:
        raise InputError(f"{len(rest)} keys are not of format '{table.name}' (first: {rest[0]}).")
    for module in modules:  # trained with the adapter, or frozen: then it is the base's, and replacing it does nothing
        if "bias" in module.keys:
            found_biases = _biases(reader, module)
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
        notes=(*_rank_notes(reader, modules), *reader.notes, *([reader.doubt] if reader.doubt else [])),
    )
    merged = {"eval": True, "train": False, None: None}[given.saved_in] if table.merges_on_eval and base else False
    return Reading(adapter, left_out, base, merged, reader.doubt)


def _sort(table: Table, checkpoint: Checkpoint) -> tuple[list[_Module], list[str], dict[str, str]]:
    """Every key to an adapted module's role, to the rest, or to what is left out."""
    matches = {key: [(r, m) for r in table.rules if (m := r.pattern.fullmatch(key))] for key in checkpoint.tensors}
    modules: dict[str, _Module] = {}
    for candidates in matches.values():
        for rule, match in candidates[:1]:
            if rule.role in ("lora_A", "lora_B", "magnitude"):
                path = table.renamed(match["module"])
                modules.setdefault(path, _Module(path))
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


_PARTS = re.compile(r"(^|[._])(lora|dora)([._]|$)|lora_?[ab]\b|magnitude|parametrizations", re.IGNORECASE)


def _refuse_leftovers(reader: _Reader, modules: Sequence[_Module], rest: Sequence[str]) -> None:
    """Keys that no rule knows but that belong to an adapter: taken as weights, their update would be lost."""
    table, adapted = reader.table, {module.path for module in modules}
    explicit = [rule.pattern for rule in table.rules if rule.role == "replace" and rule.pattern.groups == 0]
    for key in rest:
        below = table.renamed(key).rpartition(".")[0] in adapted
        if (below or _PARTS.search(key)) and not any(pattern.fullmatch(key) for pattern in explicit):
            raise InputError(
                f"{key} belongs to an adapter, but format '{table.name}' knows no such key. If it may be ignored, or "
                "is something else, say so in a table of your own (inspect --suggest-format begins one)."
            )


def _check_axis(reader: _Reader) -> None:
    """--magnitude-axis against what the table says a magnitude is."""
    table, said = reader.table, reader.given.magnitude_axis
    axes = {"in" if "in" in dims else "out" for layout in table.layouts if (dims := layout.dims.get("magnitude"))}
    if said is not None and axes and said not in axes:
        reason = next((reason for role, _, reason in table.refuse if role == "magnitude"), None)
        raise UnsupportedError(
            f"Format '{table.name}' has a magnitude for each {min(axes)}put, not for each {said}put"
            + (f"; with one for each {said}put, {reason}" if reason else ".")
        )


def _check_flags(reader: _Reader, modules: Sequence[_Module]) -> None:
    """--enable-lora that is of no module here."""
    for end in reader.given.enable_lora:
        if end and not any(_ends(module.path, end) for module in modules):
            raise UsageError(f"--enable-lora names '{end}', but no adapted module ends so.")


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _new_names(table: Table, names: Iterable[str]) -> list[tuple[str, str]]:
    return [(table.renamed(name), name) for name in names]


def _once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """New name → old name. Raises InputError where two old ones become the same."""
    found: dict[str, str] = {}
    for new, old in pairs:
        if new in found:
            raise InputError(f"{found[new]} and {old} are both {new} in the network: which one counts?")
        found[new] = old
    return found


def _check_present(reader: _Reader, module: _Module) -> None:
    missing = {"lora_A", "lora_B"} - module.keys.keys()
    if len(missing) == 1 or (missing and not reader.table.magnitude_alone):
        raise InputError(f"{module.path} has {', '.join(k for k, _ in module.keys.values())}, but no {min(missing)}.")
    for role in SHAPED:
        if role in module.keys and 0 in reader.shape(role, module):
            raise InputError(
                f"{module.keys[role][0]} is empty (shape {list(reader.shape(role, module))}): saved under ZeRO-3 or "
                "FSDP without gathering."
            )


def _find_weights(reader: _Reader, modules: Sequence[_Module]) -> None:
    """The base weights of the modules: from the same file, or from the base that the user gave, where it matters."""
    wanted = len(reader.table.layouts) > 1 or reader.table.refuse
    outside: dict[str, Ref] = {}
    if wanted and reader.given.base and not all("base" in module.keys for module in modules):
        weights, biases = ([f"{module.path}.{part}" for module in modules] for part in ("weight", "bias"))
        outside = found(reader.given.base(), weights, biases)
    for module in modules:
        own = module.keys.get("base")
        module.weight = ref(reader.checkpoint, own[0]) if own else outside.get(f"{module.path}.weight")
        module.biased = "bias" in module.keys or f"{module.path}.bias" in outside


def _measure(reader: _Reader, module: _Module) -> None:
    """Choose the layout that the shapes fit. What the table refuses by shape is refused with its reason."""
    possible = []
    for layout in reader.table.layouts:
        if layout.kind == "embedding" and (module.biased or module.path.rpartition(".")[2] in CONV1D_LAYERS):
            continue  # a linear layer that is stored (in, out)
        sizes = solve(_equations(reader, module, layout), {})
        if sizes is not None and (layout.kind != "conv" or module.weight is None or len(module.weight.shape) > 2):
            possible.append((layout, sizes))
    shaped = [role for role in ("lora_A", "lora_B", "magnitude") if role in module.keys]
    certain = [
        (layout, sizes) for layout, sizes in possible if determined((layout.dims.get(r, ()) for r in shaped), sizes)
    ]
    if not certain:
        raise _misfit(reader, module)
    module.layout, module.sizes = certain[0]
    turned = {layout.stored_in_out for layout, _ in certain if layout.kind != "conv"}
    module.square = module.weight is not None and len(turned) > 1
    rivals = [layout for layout, _ in possible if layout is not module.layout]
    # a convolution taken for a linear layer fits no loader; an embedding would be dropped by some without a word
    if module.weight is None and any(layout.kind != "conv" for layout in rivals) and not reader.doubt:
        others = " or ".join(dict.fromkeys(_spelled(layout) for layout in rivals))
        reader.doubt = (
            f"{module.path} (and maybe others) is read as {_spelled(module.layout)}, but a file of this format does "
            f"not say whether it is {others}: --base tells."
        )


def _spelled(layout: Shape) -> str:
    fused = any("parts" in labels(dim) for dim in layout.dims.get("lora_A", ()))
    if layout.kind == "linear" and (fused or layout.stored_in_out):
        return "part of a fused layer" if fused else "a linear layer stored (in, out)"
    return {"linear": "a linear layer", "embedding": "an embedding", "conv": "a convolution"}.get(layout.kind, "")


def _equations(reader: _Reader, module: _Module, layout: Shape) -> list[Equation]:
    found: list[Equation] = []
    for role in SHAPED:
        dims = layout.dims.get(role, ())
        shape = module.weight.shape if role == "base" and module.weight else None
        if shape is None and role in module.keys:
            shape = reader.shape(role, module)
        if shape is not None and dims and not (role == "bias" and layout.kind == "embedding"):
            found.append((shape, dims))
    return found


def _misfit(reader: _Reader, module: _Module) -> InputError:
    """Which tensor does not fit, by the first layout, and what the others of its module say."""
    table, first = reader.table, reader.table.layouts[0]
    for refused, dims, reason in table.refuse:
        if refused in module.keys:
            as_refused = Shape(first.kind, {**first.dims, refused: dims})
            if solve(_equations(reader, module, as_refused), {}):
                shape = list(reader.shape(refused, module))
                return UnsupportedError(f"{module.keys[refused][0]} has shape {shape}: {reason}")
    if len(table.layouts) > 1:
        shapes = [f"{key} {list(reader.checkpoint.tensors[key].shape)}" for key, rule in module.keys.values()]
        weight = f", with a base weight of {list(module.weight.shape)}" if module.weight else ""
        return InputError(
            f"{module.path}: {', '.join(shapes)}{weight}: this fits no layer that format '{table.name}' knows. Is this "
            "the right base, and is the convolution one without groups?"
        )
    equations: list[Equation] = []
    sizes: dict[str, int] = {}
    for role in SHAPED:
        wanted = first.dims.get(role)
        if role in module.keys and wanted:
            equations.append((reader.shape(role, module), wanted))
            fitting = solve(equations, {})
            if fitting is None:
                known = ", ".join(f"{label} = {n}" for label, n in sizes.items() if label != "1")
                return InputError(
                    f"{module.keys[role][0]} has shape {list(reader.shape(role, module))}, but format '{table.name}' "
                    f"has ({', '.join(wanted)}) there, and the other tensors of {module.path} say {known}."
                )
            sizes = fitting
    return InputError(f"{module.path}: its shapes do not say what format '{table.name}' needs to know; say --base.")


def _decide_orientation(reader: _Reader, modules: Sequence[_Module]) -> None:
    """Which way square weights are stored, where a table allows both: by what the base says of itself, by the other
    layers of the file if they agree, by the user; never by chance.
    """
    for module in modules:
        assert module.layout is not None
        if module.weight is not None or len(reader.table.layouts) == 1:
            module.turned = module.layout.stored_in_out or (False if len(reader.table.layouts) > 1 else None)
    doubtful = [module for module in modules if module.square]
    if not doubtful:
        return
    config = (reader.given.base().metadata.get("config") if reader.given.base else None) or {}
    kind = config.get("model_type")
    others = {m.turned for m in modules if not m.square and m.layout and m.layout.kind == "linear"}
    for module in doubtful:
        assert module.layout is not None
        assert module.weight is not None
        named = kind in CONV1D_MODELS and module.path.rpartition(".")[2] in CONV1D_LAYERS
        vocabular = config.get("vocab_size") == module.weight.shape[0]
        if reader.given.fan_in_fan_out is not None:
            module.turned = reader.given.fan_in_fan_out
        elif isinstance(kind, str) and not vocabular:
            module.turned = named
        elif len(others) == 1:
            module.turned = others == {True}
            way = "(in, out)" if module.turned else "(out, in)"
            reader.notes.append(f"{module.path} is square; it is taken to be stored {way}, as the other layers are.")
        else:
            raise InputError(
                f"{module.path} is square, so its shape does not tell whether the base stores it as (out, in) like "
                "nn.Linear, or as (in, out) like an embedding or a Conv1D. Say --no-fan-in-fan-out or "
                "--fan-in-fan-out."
            )
        fitting = [s for s in reader.table.layouts if s.stored_in_out == module.turned and s.kind != "conv"]
        sized = [(s, n) for s in fitting if (n := solve(_equations(reader, module, s), {})) is not None]
        module.layout, module.sizes = sized[0]


def _decide_square(reader: _Reader, modules: Sequence[_Module]) -> None:
    """Where inputs and outputs are equally many, a refused shape looks like a good one: decide once for the file."""
    table = reader.table
    for role, dims, reason in table.refuse:
        doubtful = []
        for module in modules:
            if role in module.keys:
                doubtful.append(module)
                if not solve([(reader.shape(role, module), dims)], module.sizes):
                    return  # this one can only be what the table reads, and a file is of one kind
        if not doubtful or reader.given.magnitude_axis is not None:
            return
        if _look_like_norms(doubtful[:4], role, reader.checkpoint):
            reader.notes.append(
                f"All layers are square; the {role}s match the norms of the base's columns, so they are those."
            )
            return
        raise InputError(
            f"All layers are square, so {doubtful[0].keys[role][0]} may be what '{table.name}' stores, or: {reason} "
            "With --base the norms of its columns may tell; if it is one magnitude for each input, say "
            "--magnitude-axis in."
        )


def _look_like_norms(modules: Iterable[_Module], role: str, checkpoint: Checkpoint) -> bool:
    """Whether the magnitudes are nearer to the column norms of the base weights than to ones, clearly.

    DoRA's begin as those norms, the other layer's as ones, and training moves either only a little.
    """
    from_norms = from_ones = 0.0
    for module in modules:
        if module.weight is None or module.weight.origin is None:
            return False
        m = ref(checkpoint, module.keys[role][0]).load().flatten()
        base, name = module.weight.origin, module.weight.key
        squares = [base.read(name, *rows).square().sum(0) for rows in tiles(base.tensors[name])]
        norms = sum(squares[1:], start=squares[0]).sqrt()
        from_norms += float((m - norms).abs().mean())
        from_ones += float((m - 1).abs().mean())
    return from_norms < 0.5 * from_ones


def _factor(reader: _Reader, module: _Module, role: str) -> Ref:
    """lora_A with its rank first, lora_B with its rank last."""
    assert module.layout is not None
    promise, dims = ref(reader.checkpoint, module.keys[role][0]), module.layout.dims.get(role, ())
    rank_at = next((i for i, dim in enumerate(dims) if "rank" in labels(dim)), 0 if role == "lora_A" else 1)
    return promise if rank_at == (0 if role == "lora_A" else 1) else promise.T


def _updates(reader: _Reader, module: _Module) -> list[Update]:
    table, sizes, layout = reader.table, module.sizes, module.layout
    assert layout is not None
    vector: Ref | None = None
    axis: Axis = "in" if "in" in layout.dims.get("magnitude", ()) else "out"
    if "magnitude" in module.keys:
        vector = ref(reader.checkpoint, module.keys["magnitude"][0]).reshape(-1)
    elif table.dora:
        raise InputError(
            f"{module.path} has no magnitude, which every module of format '{table.name}' has: was it dropped?"
        )

    def update(path: str, delta: Delta, m: Ref | None, conv: bool = False) -> Update:
        magnitude = Magnitude(m, axis, table.eps, table.eps_rule, table.scales_bias) if m else None
        kernel = module.weight.shape[1:] if conv and module.weight else ()
        return Update(path, delta, magnitude, None, layout.kind, kernel, module.turned, module.turned is not None)

    if "lora_A" not in module.keys:
        return [update(module.path, Unchanged((sizes.get("out", -1), sizes.get("in", -1))), vector)]
    rank = sizes["rank"] if "rank" in sizes else reader.shape("lora_A", module)[0]
    scaling, source = _scaling(reader, rank, module)
    a, b = _factor(reader, module, "lora_A"), _factor(reader, module, "lora_B")
    fused = next((f for f in table.fused if f.pattern.fullmatch(module.path)), None)
    if fused is None and "parts" not in sizes:
        count = b.shape[0] // sizes["out"] if "out" in sizes else 1
        if count * count * a.shape[0] * a.shape[1] > _MOST:
            raise UnsupportedError(
                f"{module.path}: a kernel of side {count} takes factors of {count * count * a.shape[0]} rows here; "
                "that is too large. Merge it where it was trained."
            )
        if count > 1:  # of a conv: the product's rows are cut out of it several to an output
            a = assembled((a.shape[0] * count, a.shape[1] * count),
                          [(a, i * a.shape[0], i * a.shape[1]) for i in range(count)])  # fmt: skip
            b = b.reshape(sizes["out"], -1)
        return [update(module.path, LowRank(a, b, scaling, source), vector, layout.kind == "conv")]
    parts = _parts(reader, module, fused, b.shape[0])
    enabled = [part for part in parts if part.at >= 0]
    own = a.shape[0] == rank * len(enabled)  # each part has its rows of lora_A; else all share them
    if fused is not None and fused.into:
        if axis == "in" and vector is not None:
            raise UnsupportedError(f"{module.path}: a magnitude for each input cannot be split with the fused layer.")
        match = fused.pattern.fullmatch(module.path)
        assert match is not None
        found = []
        for name, part in zip(fused.into, parts, strict=True):
            m = vector.rows(slice(part.start, part.start + part.rows)) if vector else None
            delta: Delta = Unchanged((part.rows, a.shape[1]))
            if part.at >= 0:
                of_a = a.rows(slice(part.order * rank, (part.order + 1) * rank)) if own else a
                delta = LowRank(of_a, b.rows(slice(part.at, part.at + part.rows)), scaling, source)
            if part.at >= 0 or m:
                found.append(update(_expanded(match, name), delta, m))
        return found
    total, width = sum(part.rows for part in parts), rank * len(enabled) if own else rank
    pieces = [(b.rows(slice(p.at, p.at + p.rows)), p.start, p.order * rank if own else 0) for p in enabled]
    return [update(module.path, LowRank(a, assembled((total, width), pieces), scaling, source), vector)]


_MOST = 1 << 28  # numbers in the factors of one convolution


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a fused layer: its rows in the layer, where they begin in lora_B (-1: it has no factors)."""

    start: int
    rows: int
    at: int
    order: int


def _parts(reader: _Reader, module: _Module, fused: Fused | None, factor_rows: int) -> list[_Part]:
    """How a fused layer is divided. Raises InputError where the file, the table and the user do not say it."""
    sizes, path, table = module.sizes, module.path, reader.table
    told = [end for end in reader.given.enable_lora if not end or _ends(path, end)]
    flags = reader.given.enable_lora[max(told, key=len)] if told else fused.enabled if fused else ()
    if fused and fused.rows:
        names = reader.settings()
        rows = [value_of(check_expression(text, table.name), names, table.name) for text in fused.rows]
    else:
        count = len(fused.into) if fused and fused.into else len(flags) or sizes.get("all", 0)
        if "part" not in sizes and count:
            on = sum(flags) if flags else count
            sizes = {**sizes, "part": factor_rows // on if on and factor_rows % on == 0 else 0}
        rows = [sizes.get("part", 0)] * count
    if not flags and (fused is not None or sizes.get("all") == sizes.get("parts")):
        flags = (True,) * len(rows)
    if not flags:
        of = f"{sizes['all']} parts" if "all" in sizes else "its parts (--base tells how many there are)"
        raise InputError(
            f"{path} is a fused layer of which {sizes['parts']} of {of} have factors, and the file does not say which. "
            "Say it as the training did, for example --enable-lora true,false,true; for single layers, --enable-lora "
            f"{path.rpartition('.')[2]}=true,false,true."
        )
    enabled = sum(n for n, on in zip(rows, flags, strict=False) if on)
    wrong = len(flags) != len(rows) or len(flags) != sizes.get("all", len(flags))
    if wrong or sum(flags) != sizes.get("parts", sum(flags)) or enabled != factor_rows or min(rows, default=0) < 1:
        said = ", ".join("true" if flag else "false" for flag in flags)
        raise InputError(
            f"{path}: parts of {', '.join(map(str, rows))} rows, of which {said} have factors, do not give the "
            f"{factor_rows} rows of its lora_B"
            + (f" ({sizes['parts']} parts of {sizes.get('all', 'an unknown number')})." if "parts" in sizes else ".")
        )
    parts, start, at, order = [], 0, 0, 0
    for n, on in zip(rows, flags, strict=True):
        parts.append(_Part(start, n, at if on else -1, order))
        start, at, order = start + n, at + n * on, order + on
    return parts


def _expanded(match: re.Match[str], name: str) -> str:
    try:
        return match.expand(name)
    except (re.error, IndexError) as error:
        raise InputError(f"'{name}' of [[fused]] into cannot be filled in: {error}.") from error


def _biases(reader: _Reader, module: _Module) -> dict[str, Replacement]:
    promise = ref(reader.checkpoint, module.keys["bias"][0])
    fused = next((f for f in reader.table.fused if f.into and f.pattern.fullmatch(module.path)), None)
    if fused is None:
        return {f"{module.path}.bias": Replacement(promise, shared=True)}
    parts = _parts(reader, module, fused, reader.shape("lora_B", module)[0])
    match = fused.pattern.fullmatch(module.path)
    assert match is not None
    return {
        f"{_expanded(match, name)}.bias": Replacement(promise.rows(slice(p.start, p.start + p.rows)), shared=True)
        for name, p in zip(fused.into, parts, strict=True)
    }


def _scaling(reader: _Reader, rank: int, module: _Module) -> tuple[float, str]:
    """The number that is multiplied, and where it comes from. Raises InputError where the file does not say."""
    table, given = reader.table, reader.given
    if given.scaling is not None:
        return given.scaling, "--scaling"
    if table.scale_rules == ("one",) and (given.alpha is not None or given.scale_rule not in (None, "one")):
        raise UsageError(f"Format '{table.name}' has no alpha: its scaling is 1. --scaling says another number.")
    rule = given.scale_rule or (table.scale_rules[0] if len(table.scale_rules) == 1 else None)
    said = "--scale-rule one" if given.scale_rule else f"1, the rule of {table.name}"
    hparams = reader.checkpoint.metadata.get("hyper_parameters", {})
    if given.scale_rule is None and rule != "one" and hparams.get("use_rslora") is True:
        rule = "rslora"
    attributes = _attributes(reader, module)
    own = _number(attributes.get("scaling")) if given.alpha is None and given.scale_rule is None else None
    if own:
        return own, "scaling of the pickled module"
    if rule is None and given.alpha is None and "alpha" in attributes:
        # of a pickled module: the class that divides by the rank keeps it, the one that does not has no use for it
        rule = "alpha/rank" if "rank" in attributes else "alpha"
    if rule == "one":
        return 1.0, said
    alpha, source = _alpha(reader, module)
    options = " or ".join(f"--scale-rule {r}" for r in table.scale_rules)
    if alpha is None:
        raise InputError(
            f"{module.path}: the file does not record alpha, on which the scale of this adapter (rank {rank}) depends. "
            f"Say --alpha{'' if rule else f' and {options}'}, or --scaling with the number that is multiplied."
        )
    if rule is None:
        numbers = {"alpha": alpha, "alpha/rank": alpha / rank, "rslora": alpha / sqrt(rank), "one": 1.0}
        means = ", ".join(f"{r} gives {numbers[r]:g}" for r in table.scale_rules)
        raise InputError(
            f"{module.path}: alpha is {alpha:g} ({source}), but nothing in the file says how '{table.name}' scales "
            f"with it: {means}. Say {options}, or --scaling with the number that is multiplied."
        )
    if rule == "alpha":
        return alpha, f"alpha, {source}"
    return alpha / (sqrt(rank) if rule == "rslora" else rank), f"{alpha:g}/{'√' * (rule == 'rslora')}{rank}, {source}"


def _attributes(reader: _Reader, module: _Module) -> Mapping[str, Any]:
    """What a pickled module remembers beside lora_A."""
    path = module.keys["lora_A"][0].rpartition(".")[0]
    found: Mapping[str, Any] = reader.checkpoint.metadata.get("attributes", {}).get(path, {})
    return found


def _alpha(reader: _Reader, module: _Module) -> tuple[float | None, str]:
    checkpoint, given = reader.checkpoint, reader.given
    if given.alpha is not None:
        return given.alpha, "--alpha"
    for name in ("alpha", "lora_alpha"):
        attribute = _number(_attributes(reader, module).get(name))
        if attribute is not None:
            return attribute, f"{name} of the pickled module"
    if "alpha" in module.keys:
        key = module.keys["alpha"][0]
        values = ref(checkpoint, key).load()
        number = _number(values.item()) if values.numel() == 1 else None
        if number is None:
            raise InputError(f"{key} (shape {list(values.shape)}) is no number; an alpha is one.")
        return number, key
    candidates: dict[float, str] = {}
    for source in reader.table.alpha:
        kind, _, name = source.partition(":")
        if kind == "hparam":
            settings = checkpoint.metadata.get("hyper_parameters", {})
            every = checkpoint.metadata.get("hyper_parameter_values", {}).get(name, [settings.get(name)])
            numbers = [(_number(value), f"hyper_parameters.{name}") for value in every]
        elif kind == "config":
            config = checkpoint.metadata.get("adapter_config")
            numbers = [(_number(config.get(name)) if isinstance(config, Mapping) else None, f"adapter_config.{name}")]
        else:
            numbers = [] if candidates else [(float(name), f"the table's {name}")]
        candidates |= {value: where for value, where in numbers if value is not None and value not in candidates}
    if len(candidates) > 1:
        said = ", ".join(f"{where} is {value:g}" for value, where in candidates.items())
        raise InputError(f"{module.path}: {said}. Which one is the adapter's alpha? Say it with --alpha.")
    return next(iter(candidates.items()), (None, ""))


def _number(value: object) -> float | None:
    """A setting as a finite number, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)


def _rank_notes(reader: _Reader, modules: Sequence[_Module]) -> Iterable[str]:
    """A rank among the hyper-parameters that no factor has: they may be those of another run."""
    hparams = reader.checkpoint.metadata.get("hyper_parameters", {})
    ranks = {module.sizes["rank"] for module in modules if "rank" in module.sizes}
    for name in ("lora_rank", "lora_r", "rank", "r"):
        said = hparams.get(name)
        if isinstance(said, int) and not isinstance(said, bool) and ranks and said not in ranks:
            yield f"hyper_parameters.{name} is {said}, but the factors have rank {', '.join(map(str, sorted(ranks)))}."


def _base(table: Table, modules: Sequence[_Module], rest: Iterable[str], checkpoint: Checkpoint) -> Checkpoint | None:
    """The base that came in the same file, under the network's plain names."""
    if any(fused.into and fused.pattern.fullmatch(m.path) for m in modules for fused in table.fused):
        return None  # its fused weights are not those of the network that the parts belong to
    own = [(f"{m.path}.weight", m.keys["base"][0]) for m in modules if "base" in m.keys]
    own += [(f"{m.path}.bias", m.keys["bias"][0]) for m in modules if "bias" in m.keys]
    sources = _once([*own, *_new_names(table, rest)])
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


def _write(table: Table, adapter: Adapter) -> Written:
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
        if isinstance(delta, LowRank):
            # the factor carries the scaling: alpha is not recorded, or one number for all ranks
            b = delta.lora_B.times(delta.scaling / _told_scale(table, delta.rank, largest if alpha_key else None))
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
            raise TargetError(
                f"{update.module} is DoRA with a magnitude for each {m.axis}put, which format '{table.name}' does not "
                "hold. A dense merge keeps it exactly."
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
    again, _, _ = _sort(table, Tensors(refs))
    lost = {u.module for u in adapter.updates} ^ {module.path for module in again}
    if lost:
        raise TargetError(f"{min(lost)} cannot be written so that format '{table.name}' reads the same name back.")
    if alpha_key:
        config = {**table.config, "r": largest, alpha_key: largest, "base_model_name_or_path": adapter.base_model}
        config["target_modules"] = sorted({u.module.rpartition(".")[2] for u in adapter.updates})
        text = json.dumps(config, indent=2, sort_keys=True).encode()
        return Written(Tensors(refs), table.file, {"adapter_config.json": text})
    if any(source.startswith("literal:") for source in table.alpha):
        return Written(Tensors(refs), table.file)
    note = {"alpha": "alpha = 1", "one": "", "rslora": "alpha = √rank"}.get(table.scale_rules[0], "alpha = rank")
    notes = (f"The scaling is in lora_B: use it with {note}, a scaling of 1.",) if note else ()
    return Written(Tensors(refs), table.file, notes=notes)


def _told_scale(table: Table, rank: int, config_alpha: int | None) -> float:
    """The scaling that a reader of what is written finds there: of the config's alpha, or the table's own; else 1."""
    literal = next((float(s.partition(":")[2]) for s in table.alpha if s.startswith("literal:")), None)
    alpha = config_alpha if config_alpha is not None else literal
    rule = table.scale_rules[0]
    if alpha is None or rule == "one":
        return 1.0
    return alpha / {"alpha": 1, "alpha/rank": rank, "rslora": sqrt(rank)}[rule]


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
