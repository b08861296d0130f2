"""What a binding is made of: updates as a base stores them, and the plan in which they are gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..adapter import Delta, Magnitude, Replacement, Update
from ..checkpoint import Checkpoint
from ..names.gguf import EMBEDDING, HEAD, Dialect
from ..names.places import Places
from ..names.ties import ties_of


@dataclass(frozen=True, slots=True)
class Bound:
    """One update on one stored matrix: ``delta`` and ``magnitude`` as the base stores it, rows first.

    ``turned``: the base stores the transpose of what the update is of. ``follows``: for a bias that is multiplied by
    the factors m / n of a weight: its name, and which of its updates. ``part``: the rows [first, last) of the stored
    matrix that it is of; None: all.
    """

    module: str
    delta: Delta
    magnitude: Magnitude | None
    strength: float = 1.0
    follows: tuple[str, int] | None = None
    turned: bool = False
    part: tuple[int, int] | None = None


@dataclass
class Plan:
    """A binding in the making."""

    base: Checkpoint
    config: dict[str, Any]
    updates: dict[str, list[tuple[Update, float]]] = field(default_factory=dict)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    touched: dict[str, set[int]] = field(default_factory=dict)  # which of the adapters update a tensor
    owners: dict[str, int] = field(default_factory=dict)  # which of them replaces it
    trained_on: str = ""
    task: str | None = None
    dialect: Dialect | None = None  # of a GGUF base
    untie: bool = False
    many: bool = False  # adapters

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""

    @property
    def model_type(self) -> str:
        return self.places.model_type

    @cached_property
    def places(self) -> Places:
        return Places(self.base.tensors, self.config)

    @property
    def ties(self) -> dict[str, str] | None:
        """Tied name → the name of what it is tied to, as this base spells them; None for an unknown language model."""
        if self.dialect:
            return {HEAD: EMBEDDING}
        if self.config and not self.architecture:
            return None
        ties = ties_of(self.architecture, self.task)
        if ties is None:
            return None
        pairs = {self.places.own(tied): self.places.own(source) for tied, source in ties.items()}
        known = self.base.tensors  # a file may hold either end
        return {
            t if s in known or t not in known else s: s if s in known or t not in known else t for t, s in pairs.items()
        }

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of what is tied to an embedding; rows that were trained in one are no other's."""
        if self.dialect:
            return frozenset({HEAD})
        return frozenset(self.places.own(tied) for tied in ties_of(self.architecture, self.task) or {})

    @property
    def tied_off(self) -> bool:
        return setting(self.config, "tie_word_embeddings") is False

    def knows(self, name: str) -> bool:
        return name in self.base.tensors or name in self.aliases or name in self.replaced

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.replaced:
            return self.replaced[name].tensor.shape
        return self.base.tensors[self.aliases.get(name, name)].shape


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the model, or of its text part in a multimodal config."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)


def set_setting(config: dict[str, Any], key: str, value: Any) -> None:
    if not config:
        return  # the base has no config.json to edit
    text = config.get("text_config")
    if isinstance(text, dict):
        text[key] = value
    if not isinstance(text, dict) or key in config or key == "tie_word_embeddings":
        config[key] = value
