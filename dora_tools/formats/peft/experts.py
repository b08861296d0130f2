"""``target_parameters``: PEFT's LoRA of a bare parameter, mostly of one that stacks the matrices of experts.

lora_A is (E·rank, X), expert by expert; lora_B is (Y, E·rank) with the expert running fastest. The parameter's name is
not in the key: of several of one module the last registered stands bare, the others in ``base_layer.`` of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from ...adapter import LowRank, Update
from ...checkpoint import Checkpoint, Ref, remembered
from ...errors import FitError, InputError, UnsupportedError
from ...names.stacks import Stacks
from ...names.ties import TRANSPOSED_EXPERTS
from .. import Given
from .config import Patterns, version_of
from .keys import Module
from .lora import Settings, factors

LAYOUTS = ("rank_major", "grouped_by_expert")
_SWAPS_SINCE, _SWAPS_RIGHT_SINCE = (0, 19), (0, 19, 1)
ORDER = ("gate_up_proj", "down_proj")  # as transformers registers them


def targeted(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, but for plain weights."""
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, parameter = target.rpartition(".")
        if module == owner or module.endswith(f".{owner}") or not owner:
            found.append(parameter)
    return list(dict.fromkeys(found))


def stacked(
    checkpoint: Checkpoint, levels: Sequence[Module], settings: Settings, ranks: Patterns, given: Given
) -> tuple[list[Update], str]:
    """The updates of one module's parameters, one for each expert, and what only the base could tell ("" for none).

    ``levels``: the module's factors, the bare ones first. Raises InputError and FitError where names and shapes do not
    tell which parameter is meant.
    """
    path, config = levels[0].path, settings.config
    names = targeted(path, config)
    shapes: dict[str, tuple[int, ...]] = {}
    stacks = Stacks.of(given.base()) if given.base is not None else None
    if stacks is not None:
        shapes = {name: shape for name in names if (shape := stacks.shape(f"{path}.{name}"))}
        names = [name for name in names if name in shapes]
    pairs = [factors(checkpoint, level)[:2] for level in levels]
    owners, doubt = _assigned(path, pairs, names, shapes)
    layout = _layout(path, config, given)
    updates = []
    for name, (a, b) in zip(owners, pairs, strict=True):
        full = f"{path}.{name}"
        rank = int(ranks[full])
        shape = shapes.get(name, ())
        count = shape[0] if len(shape) == 3 else 1 if shape else a.shape[0] // max(1, rank)
        if not count or not a.shape[0] or a.shape[0] % count or a.shape[0] != b.shape[1]:
            raise FitError(
                f"{full}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}, which are not {count} experts "
                f"of one rank. Is this the right base model?"
            )
        rank = a.shape[0] // count
        scaling, source = settings.scaling(full, rank)
        if len(shape) == 2 or (not shape and count == 1):
            updates.append(Update(path, LowRank(a, b, scaling, source), parameter=name, transposed=False, told=True))
            continue
        turned = _turned(config, given, stacks.model_type if stacks is not None else None)
        a, b = remembered(a), remembered(b)
        for e in range(count):
            columns = slice(e, None, count) if layout == "rank_major" else slice(e * rank, (e + 1) * rank)
            low = LowRank(a.rows(slice(e * rank, (e + 1) * rank)), b.T.rows(columns).T, scaling, source)
            at = f"{path}.{e}.{name}"
            updates.append(Update(at, low, kind="expert", transposed=turned, told=turned is not None))
    return updates, doubt


def _assigned(
    path: str, pairs: Sequence[tuple[Ref, Ref]], names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], str]:
    """Which parameter each pair of factors is of: by shape, and where that leaves a choice by order."""
    if len(names) < len(pairs):
        raise FitError(
            f"{path}: {len(pairs)} parameters of it are adapted, and target_parameters names "
            f"{len(names)} that {'the base has' if shapes else 'it may have'}."
        )
    known = [name for name in reversed(ORDER) if name in names]
    usual = [*known, *(name for name in names if name not in known)][: len(pairs)] if len(known) > 1 else None

    def fits(name: str, pair: tuple[Ref, Ref]) -> bool:
        sides = {pair[0].shape[-1], pair[1].shape[0]}
        return not shapes or set(shapes[name][-2:]) == sides

    ways = [list(way) for way in permutations(names, len(pairs)) if all(map(fits, way, pairs))]
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


def _layout(path: str, config: Mapping[str, Any], given: Given) -> str:
    layout = given.lora_b_layout or config.get("lora_B_layout")
    if layout is None and _unsloth(config):
        raise InputError(
            f"{path}: Unsloth wrote this adapter of experts without lora_B_layout, and until September 2026 it ordered "
            "the columns of lora_B otherwise than PEFT. Say --lora-b-layout grouped_by_expert for one of its older "
            "versions, or rank_major for PEFT's order."
        )
    if layout not in (None, *LAYOUTS):
        raise InputError(f"adapter_config.json: lora_B_layout is {layout!r}; known are {' and '.join(LAYOUTS)}.")
    return layout or "rank_major"


def _unsloth(config: Mapping[str, Any]) -> bool:
    marks = config.get("auto_mapping"), config.get("base_model_name_or_path")
    return any("unsloth" in str(mark).lower() for mark in marks)


def _turned(config: Mapping[str, Any], given: Given, model_type: str | None) -> bool | None:
    """Whether the stored matrix is the transpose of lora_B @ lora_A, where its shape does not tell; None: unknown."""
    version = version_of(config, given.peft_version)
    if version is None:
        return None
    if version < _SWAPS_SINCE:
        return True
    if model_type is None:
        return None
    transposed = model_type in TRANSPOSED_EXPERTS
    return transposed if version >= _SWAPS_RIGHT_SINCE else not transposed
