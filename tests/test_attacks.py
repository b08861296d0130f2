"""Inputs that once gave a wrong model, lost a tensor, hung, or broke the program: each refused, or merged right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dora_tools as dt
from dora_tools.cli import main

from . import tiny

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def run(base: Path, adapter: Path, out: Path, *options: str) -> int:
    return main(["merge", str(adapter), "--base", str(base), "-o", str(out), *options])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal Gemma 3, saved by transformers under its older names (language_model.model.…)."""
    import transformers

    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "saved"])
def test_ties_of_a_multimodal_model_under_its_older_names(gemma: Path, tmp_path: Path, target: str) -> None:
    import peft
    import transformers

    loader = transformers.Gemma3ForConditionalGeneration
    options: dict[str, Any] = {"target_modules": ["q_proj", target]}
    if target == "saved":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    model = peft.get_peft_model(loader.from_pretrained(gemma), peft.LoraConfig(r=2, lora_alpha=4, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    dt.merge(tmp_path / "adapter", gemma, tmp_path / "out")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        merged = loader.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits
        base = loader.from_pretrained(gemma).eval()(input_ids=ids).logits
    scale = trained.abs().max()
    assert (merged - trained).abs().max() < 1e-5 * scale
    assert (base - trained).abs().max() > 1e-2 * scale


def test_only_heads_of_a_task_are_added(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    arrays = tiny.adapter_arrays() | {"base_model.model.mdoel.embed_tokens.weight": np.zeros((16, 8), np.float32)}
    adapter = tiny.write_adapter(tmp_path / "adapter", arrays, modules_to_save=["embed_tokens"])
    assert run(base, adapter, tmp_path / "out") == 4


@pytest.mark.parametrize("architectures", [None, [], [None], "LlamaForCausalLM", {"a": 1}, 3])
def test_an_unusable_architecture_is_not_taken_for_untied(tmp_path: Path, architectures: object) -> None:
    arrays = tiny.base_arrays()
    del arrays["lm_head.weight"]
    base = tiny.write_base(tmp_path / "base", arrays, architectures=architectures, tie_word_embeddings=True)
    saved = tiny.adapter_arrays() | {"base_model.model.model.embed_tokens.weight": np.zeros((16, 8), np.float32)}
    adapter = tiny.write_adapter(tmp_path / "adapter", saved, modules_to_save=["embed_tokens"])
    assert run(base, adapter, tmp_path / "out") == 3
    assert run(base, tiny.write_adapter(tmp_path / "plain"), tmp_path / "fine") == 0


def test_stored_ends_that_differ_are_not_one_weight(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")  # config silent, both stored, different
    new = np.full((16, 8), 2, np.float32)
    adapter = tiny.write_adapter(
        tmp_path / "adapter", tiny.adapter_arrays() | {"base_model.model.model.embed_tokens.weight": new}
    )
    assert run(base, adapter, tmp_path / "out") == 0
    merged = tiny.read_model(tmp_path / "out")
    assert (merged["model.embed_tokens.weight"] == new).all()
    assert (merged["lm_head.weight"] == tiny.base_arrays()["lm_head.weight"]).all()


def test_merged_values_beyond_float16(tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in tiny.base_arrays().items()}
    base = tiny.write_base(tmp_path / "base", arrays)
    factors = tiny.adapter_arrays(dora=False)
    factors[f"base_model.model.{Q}.lora_B.weight"] *= 1e6
    adapter = tiny.write_adapter(tmp_path / "adapter", factors, use_dora=False)
    assert run(base, adapter, tmp_path / "out") == 4
    assert not (tmp_path / "out").exists()


def square(module: str) -> tuple[tiny.Arrays, tiny.Arrays, np.ndarray]:
    random = np.random.default_rng(7)
    w, a, b = (random.normal(size=s).astype(np.float32) for s in ((8, 8), (2, 8), (8, 2)))
    key = f"base_model.model.{module}."
    return {f"{module}.weight": w}, {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}, 3 * (b @ a)


@pytest.mark.parametrize(
    ("module", "model_type", "flag", "turned"),
    [
        ("transformer.h.0.attn.c_proj", "gpt2", False, True),
        ("encoder.layer.0.attention.query", "gpt2", False, False),
        ("encoder.layer.0.attention.query", "gpt2", True, None),
        ("h.0.attn.c_proj", "vision-encoder-decoder", True, True),
        ("text_model.layers.0.self_attn.q_proj", "clvp", False, False),
        ("model.layers.0.q_proj", "llama", False, False),
        ("model.layers.0.q_proj", "home-made", True, None),
    ],
)
def test_square_weights(tmp_path: Path, module: str, model_type: str, flag: bool, turned: bool | None) -> None:
    arrays, factors, delta = square(module)
    base = tiny.write_base(tmp_path / "base", arrays, model_type=model_type)
    adapter = tiny.write_adapter(tmp_path / "adapter", factors, use_dora=False, fan_in_fan_out=flag)
    if turned is None:
        assert run(base, adapter, tmp_path / "out") == 4
        return
    assert run(base, adapter, tmp_path / "out") == 0
    change = tiny.read_model(tmp_path / "out")[f"{module}.weight"] - arrays[f"{module}.weight"]
    np.testing.assert_allclose(change, delta.T if turned else delta, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        ("text_model.layers.0.q", "vision_model.layers.0.q"),
        ("encoder.block.q", "decoder.block.q"),
        ("model.layers.40.q", "model.layers.0.q"),
        ("layer.self.query", "layer.cross.query"),
    ],
)
def test_one_part_of_a_model_is_not_taken_for_another(tmp_path: Path, trained: str, stored: str) -> None:
    factors = square(trained)[1]
    base = tiny.write_base(tmp_path / "base", square(stored)[0])
    assert run(base, tiny.write_adapter(tmp_path / "adapter", factors, use_dora=False), tmp_path / "out") == 4


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_factors_hold_fractions(tmp_path: Path, dtype: Any) -> None:
    arrays = tiny.adapter_arrays()
    arrays[f"base_model.model.{Q}.lora_A.weight"] = np.ones((2, 8), dtype)
    adapter = tiny.write_adapter(tmp_path / "adapter", arrays)
    assert run(tiny.write_base(tmp_path / "base"), adapter, tmp_path / "out") == 3


BAD_CONFIG: list[dict[str, Any]] = [
    {"use_rslora": "false"}, {"use_dora": [1]}, {"modules_to_save": "lm_head"}, {"modules_to_save": 3},
    {"lora_alpha": 10**400}, {"r": 10**400}, {"alpha_pattern": {"(a+)+b": 4}}, 
    {"alpha_pattern": {"a{99999999999999}": 4}},
    {"alpha_pattern": {"(" * 5000: 4}}, {"rank_pattern": {"(a|a)*b": 4}}, {"alpha_pattern": {".*" * 9 + "x": 1}},
]  # fmt: skip


@pytest.mark.parametrize("config", BAD_CONFIG, ids=lambda c: str(c)[:40])
@pytest.mark.timeout(20)
def test_configs_that_make_no_sense(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", **config)
    assert run(tiny.write_base(tmp_path / "base"), adapter, tmp_path / "out") == 3


def test_a_key_that_stands_twice_in_the_config(tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter")
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.replace("{", '{"lora_alpha": 99, ', 1))
    assert run(tiny.write_base(tmp_path / "base"), adapter, tmp_path / "out") == 3


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": []},
        {"id2label": 3},
        {"torch_dtype": 3},
        {"text_config": []},
        {"vocab_size": "x"},
        {"name": "\ud800"},
    ],
    ids=str,
)
def test_odd_base_configs_do_not_break(tmp_path: Path, config: dict[str, Any]) -> None:
    base, adapter = tiny.write_base(tmp_path / "base", **config), tiny.write_adapter(tmp_path / "adapter")
    assert run(base, adapter, tmp_path / "out") == 0
    assert run(tiny.write_base(tmp_path / "b2", quantization_config="gptq"), adapter, tmp_path / "o2") == 3


def test_second_copies_must_be_equal(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", tie_word_embeddings=False)
    one = {"base_model.model.lm_head.weight": np.ones((16, 8), np.float32)}
    two = {"base_model.model.lm_head.modules_to_save.default.weight": np.zeros((16, 8), np.float32)}
    adapter = tiny.write_adapter(tmp_path / "adapter", tiny.adapter_arrays() | one | two, modules_to_save=["lm_head"])
    assert run(base, adapter, tmp_path / "out") == 3


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    base, adapter = tiny.write_base(tmp_path / "base"), tiny.write_adapter(tmp_path / "adapter")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    file = ["--base", str(base / "model.safetensors")]
    assert main(["merge", str(adapter), *file, "-o", str(adapter / "adapter_model.safetensors"), "--force"]) == 2
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert run(base, adapter, base / "merged") == 2


def test_links_out_of_the_base_are_not_followed(tmp_path: Path) -> None:
    base, adapter = tiny.write_base(tmp_path / "base"), tiny.write_adapter(tmp_path / "adapter")
    (tmp_path / "secret.txt").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert run(base, adapter, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("where", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, where: str) -> None:
    base, adapter = tiny.write_base(tmp_path / "base"), tiny.write_adapter(tmp_path / "adapter")
    (tmp_path / where).unlink()
    os.mkfifo(tmp_path / where)
    assert run(base, adapter, tmp_path / "out") == 3


def test_index_and_single_file_are_ambiguous(tmp_path: Path) -> None:
    base, adapter = tiny.write_base(tmp_path / "base", shards=2), tiny.write_adapter(tmp_path / "adapter")
    tiny.write_base(base)
    assert run(base, adapter, tmp_path / "out") == 3


@pytest.mark.parametrize("spec", ["a/..", "-a/b", "a/b--c", "a/b.git", "x" * 300])
def test_names_that_are_no_repository(spec: str, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter")
    assert main(["merge", str(adapter), f"--base={spec}", "-o", str(tmp_path / "out")]) in {3, 6}


def test_markup_in_names_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base_model_name_or_path="[/x]")
    assert main(["inspect", str(adapter)]) == 0
    assert "[/x]" in capsys.readouterr().out
    assert run(tiny.write_base(tmp_path / "base"), adapter, tmp_path / "[/x]") == 0


def test_reports_are_json_even_where_nothing_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = tiny.base_arrays()
    arrays[f"{UP}.weight"][:] = 0
    adapter = tiny.write_adapter(tmp_path / "adapter", tiny.adapter_arrays(dora=False), use_dora=False)
    assert run(tiny.write_base(tmp_path / "base", arrays), adapter, tmp_path / "out", "--stats", "--json") == 0

    def refuse(text: str) -> None:
        raise AssertionError(text)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["relative_change"][f"{UP}.weight"] is None
    json.loads((tmp_path / "out" / "dora_tools.json").read_text(), parse_constant=refuse)


def test_unknown_options_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", brand_new_option=3)
    assert run(tiny.write_base(tmp_path / "base"), adapter, tmp_path / "out") == 0
    assert "does not know: brand_new_option" in capsys.readouterr().err


def test_a_linear_layer_beside_gpt2_in_one_model(tmp_path: Path) -> None:
    """ViT and GPT-2 in one: PEFT's config has a single fan_in_fan_out for both kinds of layers."""
    linear, first, delta = square("encoder.layer.0.attention.query")
    conv1d, second, other = square("decoder.h.0.attn.c_proj")
    config: dict[str, Any] = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    base = tiny.write_base(tmp_path / "base", linear | conv1d, **config)
    adapter = tiny.write_adapter(tmp_path / "adapter", first | second, use_dora=False, fan_in_fan_out=True)
    assert run(base, adapter, tmp_path / "out") == 0
    merged = tiny.read_model(tmp_path / "out")
    for name, change in (("encoder.layer.0.attention.query", delta), ("decoder.h.0.attn.c_proj", other.T)):
        before = (linear | conv1d)[f"{name}.weight"]
        np.testing.assert_allclose(merged[f"{name}.weight"] - before, change, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "score.weight"])
def test_tensors_saved_whole_are_checked_too(tmp_path: Path, name: str, value: float) -> None:
    shape = {"model.norm.weight": (8,), "lm_head.weight": (16, 8), "score.weight": (3, 8)}[name]
    saved = np.ones(shape, np.float32)
    saved.flat[3] = value
    adapter = tiny.write_adapter(
        tmp_path / "adapter",
        tiny.adapter_arrays() | {f"base_model.model.{name}": saved},
        modules_to_save=[name.removesuffix(".weight").rpartition(".")[2]],
    )
    base = tiny.write_base(tmp_path / "base", tie_word_embeddings=False)
    assert run(base, adapter, tmp_path / "out") == 3
    assert not (tmp_path / "out").exists()
    assert run(base, adapter, tmp_path / "out", "--allow-nonfinite") == 0
