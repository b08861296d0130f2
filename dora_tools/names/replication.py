"""A model with some of its layers in it several times: PEFT's ``layer_replication``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo, View
from ..errors import FitError, UnsupportedError

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LIST = re.compile(r"^((?:.*?\.)?(?:layers|layer|h))\.(\d+)\.")


def replicated(
    base: Checkpoint, config: dict[str, Any], ranges: Sequence[tuple[int, int]]
) -> tuple[Checkpoint, list[str]]:
    """``base`` with the layers of the ranges [start, end) one after the other, ``config`` changed to match; and notes.

    Raises FitError where it has no such layers, UnsupportedError for a base without names of layers to go by.
    """
    lists: dict[str, set[int]] = {}
    for name in base.tensors:
        if match := _LIST.match(name):
            lists.setdefault(match[1], set()).add(int(match[2]))
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    count = next((settings[key] for key in _COUNTS if isinstance(settings.get(key), int)), None)
    found = [p for p, ns in lists.items() if len(ns) == (count or len(ns)) and ns == set(range(len(ns)))]
    if "gguf" in base.metadata or len(found) != 1:
        raise UnsupportedError(
            "The adapter was trained with replicated layers (layer_replication), and of this base dora-tools cannot "
            "tell which names are those of its layers."
        )
    prefix, known = found[0], lists[found[0]]
    most = max(last for _, last in ranges) - 1
    if most not in known:
        raise FitError(
            f"layer_replication names layer {most}, and the base has {len(known)} of them ({prefix}.0 to "
            f"{prefix}.{len(known) - 1}). Is this the right base model?"
        )
    order = [layer for first, last in ranges for layer in range(first, last)]
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)
    tensors: dict[str, TensorInfo] = {}
    sources: dict[str, tuple[Checkpoint, str]] = {}
    for name, info in base.tensors.items():
        match = _LIST.match(name)
        if match is None or match[1] != prefix:
            names = [name]
        else:
            names = [f"{prefix}.{new}.{name[match.end() :]}" for new in copies.get(int(match[2]), ())]
        for new_name in names:
            tensors[new_name], sources[new_name] = replace(info), (base, name)
    for key in _COUNTS:
        if key in settings:
            settings[key] = len(order)
    for key, values in settings.items():
        if isinstance(values, list) and len(values) == len(known) and "layer" in key:
            settings[key] = [values[old] for old in order]
    note = f"The {len(known)} layers of the base become {len(order)}, as the adapter was trained: {_said(order)}."
    return View(sources, tensors, base.metadata), [note]


def _said(order: Sequence[int]) -> str:
    shown = ", ".join(map(str, order[:16]))
    return f"{shown}, …" if len(order) > 16 else shown
