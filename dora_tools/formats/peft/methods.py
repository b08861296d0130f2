"""PEFT's other methods that change weights: what each makes of a module's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...adapter import Update
from ...checkpoint import Checkpoint
from .. import Given
from .keys import Keys


@dataclass(frozen=True, slots=True)
class Method:
    """``leaves``: its keys, ``leaf`` or ``leaf.bias``; ``begins``: whether a segment of a key is a leaf at all."""

    leaves: frozenset[str]
    begins: Callable[[str], bool]
    read: Callable[[Checkpoint, Mapping[str, Any], Keys, Given, list[str]], list[Update]]
    only_training: frozenset[str] = frozenset()


METHODS: dict[str, Method] = {}
