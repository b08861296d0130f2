"""``target_parameters``: PEFT's LoRA of a bare parameter, mostly of one that stacks the matrices of experts.

lora_A is (E·rank, X), expert by expert; lora_B is (Y, E·rank) with the expert running fastest. The parameter's name is
not in the key: of several of one module the last registered stands bare, the others in ``base_layer.`` of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from ...adapter import LowRank, Update
from ...checkpoint import Checkpoint, Ref, remembered
from ...errors import FitError, InputError, UnsupportedError
from ...names.pieces import expert_of
from ...names.places import Places, places_of
from ...names.ties import TRANSPOSED_EXPERTS
from .. import Given
from .config import Patterns, version_of
from .keys import Module
from .lora import Settings, factors

LAYOUTS = ("rank_major", "grouped_by_expert")
_LEAVES = ("lora_A", "lora_B")
_MOST = 6  # parameters of a module, whose orders are tried
ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # as transformers registers them


def hf_places(given: Given) -> Places | None:
    """Where names stand in the base, if there is one with names of Hugging Face's."""
    base = given.base() if given.base is not None else None
    return places_of(base) if base is not None and "gguf" not in base.metadata else None


def targeted(module: str, config: Mapping[str, Any], places: Places | None = None) -> list[str]:
    """The parameters of a module that ``target_parameters`` may mean.

    A name alone is of every module that has such a parameter, which is none that ``target_modules`` names, or whose
    weight is a target, or that has a weight in the base (``places``).
    """
    targets = [target.rpartition(".")[::2] for target in config.get("target_parameters") or ()]
    owned = [parameter for owner, parameter in targets if owner and (module == owner or module.endswith(f".{owner}"))]
    bare = [parameter for owner, parameter in targets if not owner]
    listed = config.get("target_modules")
    layer = (
        "weight" in owned
        or (isinstance(listed, list) and any(module == name or module.endswith(f".{name}") for name in listed))
        or (bool(bare) and places is not None and places.shape(f"{module}.weight") is not None)
    )
    return list(dict.fromkeys(owned if layer else owned + bare))


@dataclass(frozen=True)
class _Stack:
    """Factors of one parameter as the file has them. ``shape``: of the parameter, () where no base tells."""

    path: str
    name: str
    a: Ref
    b: Ref
    shape: tuple[int, ...]

    @property
    def first(self) -> bool | None:
        """Whether lora_A is of the first of a matrix' two axes; None where its shape does not tell."""
        if len(self.shape) != 3:
            return None
        sizes = self.a.shape[-1], self.b.shape[0]
        upright, turned = sizes == self.shape[:0:-1], sizes == self.shape[1:]
        return turned if upright != turned and self.shape[0] > 1 else None


def stacked(
    checkpoint: Checkpoint, modules: Sequence[Sequence[Module]], settings: Settings, ranks: Patterns, given: Given
) -> tuple[list[Update], str]:
    """The updates of all adapted parameters, one for each expert, and what only the base could tell ("" for none).

    ``modules``: of each module its factors, the bare ones first. Updates are given as the newest PEFT writes them, so
    that of an older one they may be the transpose of the file's. Raises InputError and FitError where names and shapes
    do not tell which parameter is meant.
    """
    places, in_gguf = hf_places(given), given.base is not None and "gguf" in given.base().metadata
    paths = [levels[0].path for levels in modules]
    full = [f"{path}.{name}" for path in paths for name in targeted(path, settings.config)]
    rule = places.rule(full) if places is not None else ("", "")
    found: list[_Stack] = []
    doubts: list[str] = []
    for levels in modules:
        path = levels[0].path
        names = targeted(path, settings.config)
        shapes: dict[str, tuple[int, ...]] = {}
        if places is not None:
            spelled = {name: places.place(f"{path}.{name}", rule) for name in names}
            shapes = {name: shape for name, there in spelled.items() if (shape := places.shape(there))}
            names = [name for name in names if name in shapes]
        _check(levels)
        pairs = [factors(checkpoint, level)[:2] for level in levels]
        owners, doubt = _assigned(path, pairs, names, shapes)
        doubts += [doubt] * bool(doubt)
        found += [_Stack(path, n, a, b, shapes.get(n, ())) for n, (a, b) in zip(owners, pairs, strict=True)]
    told = {stack.first for stack in found} - {None}  # it goes by the kind of layer, of which there is one
    flagged = places.model_type in TRANSPOSED_EXPERTS if places is not None else False if in_gguf else None
    first = told.pop() if len(told) == 1 else _first(settings.config, given, flagged)
    updates = [update for stack in found for update in _updates(stack, settings, ranks, given, first, flagged)]
    version = version_of(settings.config, given.peft_version)
    if flagged is None and (version or (0,)) < (0, 19, 1) and any(u.kind == "expert" for u in updates):
        doubts.append("which axis of the experts' weights lora_A is of")
    return updates, doubts[0] if doubts else ""


def _check(levels: Sequence[Module]) -> None:
    """Raises InputError for a level that is missing, UnsupportedError for what PEFT has not of a bare parameter."""
    if [level.depth for level in levels] != list(range(len(levels))):
        raise InputError(
            f"{levels[0].path}: adapters of its parameters stand in base_layer of others, of which the file has none: "
            "it is incomplete."
        )
    other = next((key for level in levels for leaf, key in level.parts.items() if leaf not in _LEAVES), None)
    if other is not None:
        raise UnsupportedError(f"{other}: of target_parameters PEFT has plain lora_A and lora_B only.")


def nesting(updates: Sequence[Update]) -> dict[str, tuple[str, ...]]:
    """The adapted parameters of each module, the innermost first: as the file nests them, of updates as read."""
    found: dict[str, list[str]] = {}
    for update in updates:
        if update.kind == "expert":
            name = expert_of(update)[0]
        elif update.parameter not in ("weight", "in_proj_weight"):
            name = update.name
        else:
            continue
        path, _, parameter = name.rpartition(".")
        if parameter not in found.setdefault(path, []):
            found[path].insert(0, parameter)
    return {path: tuple(names) for path, names in found.items()}


def _updates(
    stack: _Stack, settings: Settings, ranks: Patterns, given: Given, first: bool | None, flagged: bool | None
) -> list[Update]:
    a, b, full = stack.a, stack.b, f"{stack.path}.{stack.name}"
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
        LowRank(a, b, 1.0)  # says what is wrong with it
    said, shape = max(1, int(ranks[full])), stack.shape
    count = shape[0] if len(shape) == 3 else 1 if shape else a.shape[0] // said
    if not count or a.shape[0] % count or a.shape[0] != b.shape[1]:
        raise FitError(
            f"{full}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}, which are not {count} experts of "
            "one rank. Is this the right base model?"
        )
    rank = a.shape[0] // count
    if count > 1 and "r" in settings.config and rank != said:
        raise FitError(
            f"{full}: lora_A has {a.shape[0]} rows, and the config says r = {said}, but {count} experts would have "
            f"{rank} each. Is this the right base model?"
        )
    scaling, source = settings.scaling(full, rank)
    if len(shape) == 2 or (not shape and count == 1):
        return [Update(stack.path, LowRank(a, b, scaling, source), parameter=stack.name, transposed=False, told=True)]
    first = False if count == 1 else stack.first if stack.first is not None else first
    turn = first is not None and flagged is not None and first != flagged and count > 1
    layout = _layout(stack, settings.config, given)
    a, b = remembered(a), remembered(b)
    updates = []
    for e in range(count):
        columns = slice(e, None, count) if layout == "rank_major" else slice(e * rank, (e + 1) * rank)
        low = LowRank(a.rows(slice(e * rank, (e + 1) * rank)), b.T.rows(columns).T, scaling, source)
        updates.append(
            Update(
                f"{stack.path}.{e}.{stack.name}",
                low.turned() if turn else low,
                kind="expert",
                transposed=first is not None and first != turn,
                told=first is not None,
            )
        )
    return updates


def _assigned(
    path: str, pairs: Sequence[tuple[Ref, Ref]], names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], str]:
    """Which parameter each pair of factors is of: by shape, and where that leaves a choice by order."""
    if len(names) < len(pairs):
        raise FitError(
            f"{path}: {len(pairs)} parameters of it are adapted, and target_parameters names "
            f"{len(names)} that {'the base has' if shapes else 'it may have'}."
        )
    if len(names) > _MOST:
        raise UnsupportedError(
            f"{path}: target_parameters names {len(names)} parameters of it, and dora-tools tries {_MOST}."
        )
    known = [name for name in reversed(ORDER) if name in names]
    usual = [*known, *(name for name in names if name not in known)][: len(pairs)] if len(known) > 1 else None

    sides = [{a.shape[-1], b.shape[0]} for a, b in pairs]

    def fit(way: Sequence[str]) -> bool:
        if shapes:
            return all(set(shapes[name][-2:]) == side for name, side in zip(way, sides, strict=True))
        of = dict(zip(way, sides, strict=True))
        up, down = of.get("gate_up_proj", set()), of.get("down_proj", set())
        # (2 · intermediate, hidden) and (hidden, intermediate)
        return not (up and down) or any(up == {hidden, 2 * i} for hidden in down for i in (down - {hidden}) or down)

    ways = [list(way) for way in permutations(names, len(pairs)) if fit(way)]
    if not ways:
        raise FitError(
            f"{path}: the adapted parameters are of sizes "
            f"{' and '.join(f'{a.shape[-1]} × {b.shape[0]}' for a, b in pairs)}, and those of the base "
            f"{', '.join(f'{n} {list(s)}' for n, s in shapes.items())}. Is this the right base model?"
        )
    if len(ways) == 1:
        return ways[0], ""
    if usual in ways and len(names) == len(pairs):
        return usual, "" if shapes else f"which of {' and '.join(names)} is which in {path}"
    if shapes:
        raise UnsupportedError(
            f"{path}: {' and '.join(names)} of the base have the same sizes, and the file does not name the parameters "
            "that its factors are of."
        )
    return ways[0], f"which of {' and '.join(names)} is adapted in {path}"


def _layout(stack: _Stack, config: Mapping[str, Any], given: Given) -> str:
    """The order of lora_B's columns: as the user or the file says; PEFT's own, but for what Unsloth has not marked."""
    detail = config.get("unsloth_fused_expert_lora")
    parameters = detail.get("parameters") if isinstance(detail, Mapping) else None
    entry = parameters.get(stack.name) if isinstance(parameters, Mapping) else None
    told = entry.get("lora_B_layout") if isinstance(entry, Mapping) else None
    layout = given.lora_b_layout or told or config.get("lora_B_layout")
    mapping = config.get("auto_mapping")
    by_unsloth = detail is not None or (isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"))
    if layout is None and by_unsloth:
        raise InputError(
            f"{stack.path}: Unsloth wrote this adapter of experts without lora_B_layout, and until September 2026 it "
            "ordered the columns of lora_B otherwise than PEFT in some layers. Say --lora-b-layout grouped_by_expert "
            "for its own order, or rank_major for PEFT's."
        )
    if layout not in (None, *LAYOUTS):
        raise InputError(
            f"adapter_config.json: the lora_B_layout of {stack.path}.{stack.name} is {layout!r}; known are "
            f"{' and '.join(LAYOUTS)}."
        )
    return layout or "rank_major"


def _first(config: Mapping[str, Any], given: Given, flagged: bool | None) -> bool | None:
    """Whether lora_A is of the first axis of the experts' matrices, where no shape tells; None: nobody knows.

    Up to PEFT 0.18 it always was. Since 0.19.1 (in 0.19.0 the other way round) it is where transformers flags the layer
    as transposed, which only transformers 5 does; which transformers it was is not in the file.
    """
    if given.expert_lora_a is not None:
        return given.expert_lora_a == "first"
    version = version_of(config, given.peft_version)
    if version is None:
        return None
    if version < (0, 19):
        return True
    return None if flagged is not False else version < (0, 19, 1)
