"""Factors in our orientation, of single and of fused layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...adapter import Axis, Delta, LowRank, Magnitude, Replacement, Unchanged, Update
from ...checkpoint import Ref, assembled, ref
from ...errors import InputError, UnsupportedError
from .keys import Module, Reader, ends
from .scaling import scaling_of
from .shapes import labels
from .syntax import Fused, check_expression, value_of


def _factor(reader: Reader, module: Module, role: str) -> Ref:
    """lora_A with its rank first, lora_B with its rank last."""
    assert module.layout is not None
    promise, dims = ref(reader.checkpoint, module.keys[role][0]), module.layout.dims.get(role, ())
    rank_at = next((i for i, dim in enumerate(dims) if "rank" in labels(dim)), 0 if role == "lora_A" else 1)
    return promise if rank_at == (0 if role == "lora_A" else 1) else promise.T


def updates_of(reader: Reader, module: Module) -> list[Update]:
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
    scaling, source = scaling_of(reader, rank, module)
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


def _parts(reader: Reader, module: Module, fused: Fused | None, factor_rows: int) -> list[_Part]:
    """How a fused layer is divided. Raises InputError where the file, the table and the user do not say it."""
    sizes, path, table = module.sizes, module.path, reader.table
    told = [end for end in reader.given.enable_lora if not end or ends(path, end)]
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


def biases_of(reader: Reader, module: Module) -> dict[str, Replacement]:
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
