"""Regular expressions: those from files, if matching a name with them ends; and what adapters' keys look like."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import InputError

# a key with this in it is a part of some adapter, whatever wrote it
ADAPTER_PART = re.compile(r"(^|[._])(lora|dora)([._]|$)|lora_?[ab]\b|magnitude|parametrizations", re.IGNORECASE)

# stricter: no model has a weight of such a name
ADAPTER_KEY = re.compile(r"(^|\.)lora\.|lora_(embedding_)?[AB](\.|$)|lora_magnitude|weight_m_wdecomp")


def compiled(text: object, where: str, repetitions: int, form: str = "{}") -> re.Pattern[str]:
    """The pattern, put into ``form``. Raises InputError for one that is broken, or that might take forever.

    ``repetitions``: how many of * + {n,} it may have, each of which multiplies the time by the length of a name. One
    inside another, or around alternatives, makes it exponential.
    """
    if not isinstance(text, str) or len(text) > 500:
        raise InputError(f"{where}: a pattern is a text of at most 500 characters, not {str(text)[:60]!r}.")
    try:
        pattern = re.compile(form.replace("{}", text))
        count = _repeats(import_module("re._parser").parse(text), False)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where} has the broken pattern '{text:.80}' ({error}).") from error
    if count > repetitions:
        raise InputError(f"{where} has a pattern that may take forever: '{text:.80}'.")
    return pattern


def _repeats(tree: Iterable[tuple[Any, Any]], within: bool) -> int:
    """How many repetitions a parsed pattern has; far too many where one is within another."""
    count = 0
    for operation, argument in tree:
        kind = str(operation)
        if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = argument
            again = most > 1 and least != most
            count += again + _repeats(inner, within or again) + (1000 if again and within else 0)
        elif kind == "BRANCH":
            count += sum(_repeats(branch, within) for branch in argument[1]) + (1000 if within else 0)
        elif kind == "SUBPATTERN":
            count += _repeats(argument[-1], within)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            count += _repeats(argument[1], within)
        elif kind == "ATOMIC_GROUP":
            count += _repeats(argument, within)
        elif kind == "GROUPREF_EXISTS":
            count += sum(_repeats(branch, within) for branch in argument[1:] if branch)
    return count
