"""The oracle itself: llama.cpp computes from every fixture's GGUF file what transformers does from its safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import llamacpp

GGUF = Path(__file__).parent.parent / "fixtures" / "gguf"
FIXTURES = sorted(path.parent for path in GGUF.glob("*/expected.npz"))

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_the_base_is_computed_like_transformers_does(folder: Path) -> None:
    expected, bar = np.load(folder / "expected.npz"), 1e-9
    if (folder / "expected-gelu16.npz").is_file():  # llama.cpp's GELU is a table in float16
        exact, expected, bar = expected, np.load(folder / "expected-gelu16.npz"), 1e-8
        assert exact.files == expected.files
        assert all(llamacpp.nmse(expected[name], exact[name]) < 1e-6 for name in exact.files)
    found = llamacpp.log_probabilities(folder / "base.gguf", expected["tokens"].tolist())
    assert found.shape == expected["base"].shape
    np.testing.assert_allclose(np.exp(found).sum(-1), 1)
    assert llamacpp.nmse(found, expected["base"]) < bar
    adapters = [name for name in expected.files if name not in ("tokens", "base")]
    assert sorted(adapters) == sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    for name in adapters:
        assert llamacpp.nmse(found, expected[name]) > 0.02, f"a merge of {name} that does nothing would pass"


def test_what_llama_cpp_says_of_a_bad_file_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((GGUF / "llama" / "base.gguf").read_bytes()[:-64])
    with pytest.raises(RuntimeError, match="data is not within the file bounds"):
        llamacpp.log_probabilities(broken, [[5, 6]])
    with pytest.raises(RuntimeError, match="failed to load lora adapter"):
        llamacpp.log_probabilities(GGUF / "llama" / "base.gguf", [[5, 6]], [(tmp_path / "absent.gguf", 1.0)])
    with pytest.raises(RuntimeError, match="invalid tokens"):
        llamacpp.log_probabilities(GGUF / "llama" / "base.gguf", [[5, 100_000]])


def test_perplexity_is_that_of_the_prefixes() -> None:
    model, tokens = GGUF / "llama" / "base.gguf", [5, 9, 100, 31, 77]
    rows = llamacpp.log_probabilities(model, [tokens[:2], tokens[:1], tokens[:3], tokens[:4]])
    scores = [rows[1, 9], rows[0, 100], rows[2, 31], rows[3, 77]]
    assert llamacpp.perplexity(model, tokens) == pytest.approx(np.exp(-np.mean(scores)))


def test_nmse_ignores_a_constant_per_prompt() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 20))
    shift = np.array([[1.0], [-4.0], [9.0]])
    assert llamacpp.nmse(llamacpp.normalised(logits + shift), logits) < 1e-30
    assert llamacpp.nmse(1.1 * logits + shift, logits) == pytest.approx(0.01)
    assert llamacpp.nmse(np.zeros_like(logits), logits) == pytest.approx(1)
