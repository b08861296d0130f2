"""What a first user tried with adapters of their own: each is trained here by PEFT on a tiny model, and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from dora_tools import api
from dora_tools.cli import main

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.2,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartForConditionalGeneration", BART),
    "distilbert": (
        "DistilBertModel",
        "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "initializer_range": 0.2},
    ),
    "roberta": ("RobertaModel", "RobertaForSequenceClassification", {**SIZES, "intermediate_size": 24}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralForCausalLM",
        {**SIZES, "intermediate_size": 12, "num_key_value_heads": 1, "num_local_experts": 3, "initializer_range": 0.2},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaForCausalLM",
        {**SIZES, "intermediate_size": 24, "initializer_range": 0.2, "tie_word_embeddings": False},
    ),
}
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def load(cls: str, path: Path) -> Any:
    torch.manual_seed(5)
    return getattr(transformers, cls).from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = model(input_ids=IDS).logits.numpy()
    return found


def trained(name: str, folder: Path, **options: Any) -> tuple[Path, Path, np.ndarray[Any, Any]]:
    """(base, adapter, logits of the adapter model): what trains is moved at random."""
    plain, headed, sizes = MODELS[name]
    cls = getattr(transformers, plain)
    torch.manual_seed(0)
    cls(cls.config_class(**sizes)).save_pretrained(folder / "base")
    model = get_peft_model(load(headed, folder / "base"), LoraConfig(r=2, lora_alpha=3, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", logits(model)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a head of its own on an encoder-decoder model": (
        "bart",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "its embedding saved": ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}),
    "LoRA of its head": ("bart", {"target_modules": ["q_proj", "lm_head"]}),
    "a head whose name ends in classifier": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "only the layer before the head": (
        "distilbert",
        {"target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "a head of two layers": ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a saved module with layers in it": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "experts by a bare name beside layers": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]},
    ),
    "all-linear as PEFT resolves it": ("mixtral", {"target_modules": "all-linear"}),
    "use_qalora without a GPTQ model": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "use_qalora": True, "qalora_group_size": 4},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_and_written_back(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    base, adapter, expected = trained(name, tmp_path, **options)
    api.merge(adapter, base, tmp_path / "merged")
    headed = MODELS[name][1]
    model, said = getattr(transformers, headed).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not said["missing_keys"]
    assert np.abs(logits(model.eval()) - expected).max() < 1e-5
    api.convert(adapter, tmp_path / "again", "peft", base=base)
    again = PeftModel.from_pretrained(load(headed, base), str(tmp_path / "again")).eval()
    assert np.abs(logits(again) - expected).max() < 1e-5


def test_the_layer_before_the_head_has_no_labels(tmp_path: Path) -> None:
    base, adapter, _ = trained("distilbert", tmp_path, target_modules=["q_lin"], modules_to_save=["pre_classifier"])
    api.merge(adapter, base, tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text()).get("id2label", {"0": 0, "1": 1})) == 2


def test_the_trained_adapter_is_not_the_initial_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = trained("llama", tmp_path, target_modules=["q_proj"], init_lora_weights="pissa")
    run = ["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]
    assert main([*run, "--initial-adapter", str(adapter)]) == 4
    assert "before training" in capsys.readouterr().err
    assert main(run) == 0
    assert "--residual-base" in capsys.readouterr().err
    assert main(["inspect", str(adapter)]) == 0
    assert "pissa" in capsys.readouterr().out
