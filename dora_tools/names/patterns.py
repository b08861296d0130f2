"""Regular expressions from files: compiled, if matching a name with them ends."""

from __future__ import annotations

import re

from ..errors import InputError

# a repeated group with alternatives or repetitions of its own: exponential in the length of a name
_ENDLESS = re.compile(r"\([^()]*[|*+?{][^()]*\)\s*[*+{]|\)\)[*+{]")


def compiled(text: object, where: str, repetitions: int, form: str = "{}") -> re.Pattern[str]:
    """The pattern, put into ``form``. Raises InputError for one that is broken, or that might take forever.

    ``repetitions``: how many of * + {n,} it may have, each of which multiplies the time by the length of a name.
    """
    if not isinstance(text, str) or len(text) > 500:
        raise InputError(f"{where}: a pattern is a text of at most 500 characters, not {str(text)[:60]!r}.")
    if _ENDLESS.search(text) or len(re.findall(r"(?<!\\)[*+]|,\}", text)) > repetitions:
        raise InputError(f"{where} has a pattern that may take forever: '{text:.80}'.")
    try:
        return re.compile(form.format(text) if form != "{}" else text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where} has the broken pattern '{text:.80}' ({error}).") from error
