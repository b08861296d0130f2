"""Shared by all tests: nothing reaches the hub, real models by name, one tiny model of each kind per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

if TYPE_CHECKING:
    from .models import Zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny bases and the adapters that PEFT trains on them; each is made once."""
    from .models import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The directory of a real model: ``minilm``, ``smollm2`` (bfloat16) or ``smollm2-f32``; skips without network."""
    import real_models

    def find(name: str) -> Path:
        try:
            return real_models.MODELS[name]()
        except real_models.ModelUnavailableError as error:
            pytest.skip(str(error))

    return find
