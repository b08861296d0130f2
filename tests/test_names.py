"""Tables of names against their source, and what happens to models that no table knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dora_tools.cli import main
from dora_tools.names.ties import always_tied, ties_of

from . import tiny


def test_the_table_of_ties_is_what_transformers_declares() -> None:
    import make_ties

    assert json.loads(make_ties.TABLE.read_text()) == make_ties.table()


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "MambaForCausalLM", "OPTForCausalLM"]
)
def test_ties_of_the_class_itself(name: str) -> None:
    import transformers

    assert ties_of(name) == getattr(transformers, name)._tied_weights_keys


def test_architectures_without_a_language_head() -> None:
    assert ties_of("LlamaModel") == {}
    assert ties_of("LlamaModel", "CAUSAL_LM") == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ties_of("GPT2Model", "CAUSAL_LM") == {"lm_head.weight": "transformer.wte.weight"}
    assert ties_of("LlamaForSequenceClassification", "SEQ_CLS") == {}
    assert ties_of("HomeMadeForCausalLM") is None
    assert always_tied("t5")
    assert not always_tied("llama")


def embedding_adapter(folder: Path) -> Path:
    random = np.random.default_rng(3)
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    arrays = {key + "A": random.normal(size=(2, 16)), key + "B": random.normal(size=(8, 2))}
    return tiny.write_adapter(folder, {k: v.astype(np.float32) for k, v in arrays.items()}, use_dora=False)


def test_an_unknown_model_is_not_guessed_to_be_untied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = embedding_adapter(tmp_path / "adapter")
    base = tiny.write_base(tmp_path / "base", architectures=["HomeMadeForCausalLM"], model_type="home")
    run = ["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]
    assert main(run) == 3
    assert "weights are tied" in capsys.readouterr().err
    tiny.write_base(base, architectures=["HomeMadeForCausalLM"], model_type="home", tie_word_embeddings=False)
    assert main(run) == 0
    merged, before = tiny.read_model(tmp_path / "out"), tiny.base_arrays()
    assert (merged["lm_head.weight"] == before["lm_head.weight"]).all()
    assert not (merged["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]).any()


def test_models_that_cannot_be_untied_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(3)
    base = tiny.write_base(
        tmp_path / "base",
        {"shared.weight": random.normal(size=(16, 8)).astype(np.float32)},
        architectures=["T5ForConditionalGeneration"],
        model_type="t5",
    )
    key = "base_model.model.lm_head.lora_"
    arrays = {f"{key}A.weight": np.ones((2, 8), np.float32), f"{key}B.weight": np.ones((16, 2), np.float32)}
    adapter = tiny.write_adapter(tmp_path / "adapter", arrays, use_dora=False)
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]) == 5
    assert "tie them whatever" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
