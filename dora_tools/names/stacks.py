"""Parameters that stack the matrices of a layer's experts: where they lie in a base, whole or in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo
from .places import Places


@dataclass(frozen=True)
class Stacks:
    known: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @staticmethod
    def of(base: Checkpoint) -> Stacks:
        return Stacks(base.tensors, base.metadata.get("config") or {})

    @property
    def model_type(self) -> str:
        text = self.config.get("text_config")
        return str((text if isinstance(text, Mapping) else self.config).get("model_type", ""))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the parameter has in the model at run time; None where the base has none."""
        places = Places(self.known, str(self.config.get("model_type", "")))
        spelled = places.spelled(name)
        return self.known[spelled].shape if spelled in self.known else None
