"""Single rows of an embedding or head that were trained: ``trainable_token_indices``, and the method of that name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...adapter import Update
from ...checkpoint import Checkpoint, ref
from ...deltas import Tokens
from ...errors import InputError
from .keys import Keys


def token_rows(checkpoint: Checkpoint, config: Mapping[str, Any], keys: Keys) -> list[Update]:
    """An update for each module with replaced rows. PEFT calls them a delta; they are the new rows themselves, and of a
    tied pair both ends get them. Raises InputError where the config does not say which rows.
    """
    said = config.get("token_indices" if config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices")
    if said and not keys.tokens:
        raise InputError(
            "adapter_config.json names trained tokens, but the file holds no trainable_tokens_delta: it is incomplete."
        )
    updates = []
    for module, key in keys.tokens.items():
        indices = said
        if isinstance(said, Mapping):
            indices = next((v for name, v in said.items() if module == name or module.endswith(f".{name}")), None)
        rows = ref(checkpoint, key)
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise InputError(f"adapter_config.json does not say which token rows {key} holds: {said!r}.")
        if len(rows.shape) != 2 or rows.shape[0] != len(indices) or len(set(indices)) != len(indices):
            raise InputError(
                f"{key} has shape {list(rows.shape)}, and adapter_config.json names {len(indices)} tokens, of which "
                f"{len(set(indices))} are different."
            )
        updates.append(Update(module, Tokens(rows, tuple(indices)), kind="whole", shared=True))
    return updates
