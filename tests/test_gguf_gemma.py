"""Gemma 3 270M from PyPI (K-quants, tied, 262 k tokens), where its adapters have been made on this machine.

They are made from Gemma and so no part of the repository: fixtures/make_gguf.py makes them in the cache of real models.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dora_tools import api

from .llamacpp import available, log_probabilities, nmse

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import real_models  # noqa: E402 - scripts beside the fixtures, not a package

ADAPTERS = real_models.cache_dir() / "gemma3-adapters"
pytestmark = pytest.mark.skipif(
    not ((ADAPTERS / "gemma3-dora").is_dir() and available()),
    reason="needs the adapters that 'fixtures/make_gguf.py gemma3-dora gemma3-rslora' makes, and xllamacpp",
)


@pytest.mark.parametrize("name", ["gemma3-dora", "gemma3-rslora"])
def test_merged_gemma_computes_what_peft_does(name: str, tmp_path: Path) -> None:
    expected = np.load(ADAPTERS / "expected" / f"{name}.npz")
    prompts = [
        ids[: int(mask.sum())].tolist()
        for ids, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]
    wanted, base, ids = expected["logits"][:, -1], expected["base_logits"][:, -1], expected["vocab_ids"]
    assert nmse(base, wanted) > 0.1
    for kind, bound in (("f32", 1e-6), ("auto", 5e-3)):
        out = tmp_path / f"{kind}.gguf"
        plan = api.merge(ADAPTERS / name, real_models.gemma3_gguf(), out, gguf_type=kind)
        assert not plan.notes[len(api.read_adapter(ADAPTERS / name).notes) :]  # its magnitudes are of this base
        assert nmse(log_probabilities(out, prompts)[:, ids], wanted) < bound
        out.unlink()
