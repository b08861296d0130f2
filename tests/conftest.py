"""Shared by all tests: nothing reaches the hub, real models by name, one tiny model of each kind per session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import tiny

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


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny sharded model, by hand."""
    return tiny.write_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A DoRA that fits it."""
    return tiny.write_adapter(tmp_path / "adapter")
