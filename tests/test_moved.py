"""The names that transformers 5 moved: the table against its source, and what we do against what transformers does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dora_tools.errors import FitError
from dora_tools.names.moved import Moved, Piece, Whereabouts

from .conftest import FIXTURES

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
PAIRS = json.loads((FIXTURES / "moved" / "transformers4.json").read_text())["architectures"]

# Where transformers looks into the model to see that a rule does not hold, or does what the table calls unknown.
UNLIKE = {
    "DeepseekV4ForCausalLM": "model.norm.weight",
    "Inkling2ForCausalLM": "model.layers.1.attention_input.query",
    "Inkling2ForConditionalGeneration": "model.language_model.layers.1.attention_input.query",
    "Inkling2Model": "language_model.layers.1.attention_input.query",
    "Inkling2TextModel": "layers.1.attention_input.query",
    "ShieldGemma2ForImageClassification": "model.lm_head.weight",
}

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
ALL_SPARSE = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
MADE: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": EXPERTS,
    "MiniMaxM2ForCausalLM": EXPERTS,
    "PhimoeForCausalLM": EXPERTS,
    "Qwen2MoeForCausalLM": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3MoeForCausalLM": EXPERTS,
    "OlmoeForCausalLM": EXPERTS,
    "DeepseekV2ForCausalLM": {**EXPERTS, **MLA, **ALL_SPARSE},
    "DeepseekV3ForCausalLM": {**EXPERTS, **MLA, **ALL_SPARSE},
    "Glm4MoeForCausalLM": {**EXPERTS, **ALL_SPARSE},
    "Dots1ForCausalLM": {**EXPERTS, **ALL_SPARSE},
    "Ernie4_5_MoeForCausalLM": {"moe_num_experts": 3, "moe_k": 2, "moe_layer_start_index": 0},
    "HunYuanMoEV1ForCausalLM": {"num_experts": 3, "moe_topk": 2},
    "JambaForCausalLM": {**EXPERTS, "attn_layer_offset": 0, "attn_layer_period": 1, "expert_layer_offset": 0},
    "GraniteMoeForCausalLM": EXPERTS,
    "Lfm2MoeForCausalLM": {**EXPERTS, "layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
    "NomicBertModel": {},
    "GteModel": {},
    "HrmTextForCausalLM": {},
    "KimiLinearForCausalLM": {},
    "OlmoHybridForCausalLM": {},
    "GPTNeoXForCausalLM": {"rotary_dim": 4},
    "ViTForImageClassification": {},
}


@pytest.fixture(scope="module")
def source() -> Any:
    """fixtures/make_moved.py, where the installed transformers is the one that the table is of."""
    import make_moved
    import transformers

    version = json.loads(make_moved.TABLE.read_text())["transformers"]
    if transformers.__version__ != version:
        pytest.skip(f"moved.json is of transformers {version}, and {transformers.__version__} is installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return make_moved


def listed(source: Any) -> dict[str, list[Any]]:
    """The model types that the table knows, or classes of which it does."""
    names = {name for row in json.loads(source.TABLE.read_text())["models"] for name in row[-1].split()}
    every = source.architectures().items()
    return {kind: classes for kind, classes in every if names & {kind, *(c.__name__ for c in classes)}}


def test_the_table_is_what_transformers_does(source: Any) -> None:
    table = json.loads(source.TABLE.read_text())
    made = json.loads(json.dumps(source.table(listed(source))))
    assert made["rules"] == table["rules"]
    assert made == table
    assert source.rendered(made) == source.TABLE.read_text()


def test_every_architecture_is_renamed_as_transformers_does(source: Any) -> None:
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    seen, unlike, lost = 0, {}, set()
    for kind in {kind: None for classes in listed(source).values() for kind in classes}:
        model, name = source.hollow(kind)[0], kind.__name__
        if model is None:
            continue
        seen += 1
        parameters = model.state_dict()
        disk = loading.revert_weight_conversion(model, parameters)
        config = {**model.config.to_dict(), "architectures": [name]}
        moved, base = Moved(config), Whereabouts(disk, config)
        assert moved.prefix in ("", f"{model.base_model_prefix}.")
        rules = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        for tensor in sorted({*disk, *parameters}, key=loading.dot_natural_key):
            (ours, piece), *_ = moved.runtime(tensor)
            theirs, _ = loading.rename_source_key(tensor, renamings, converters)
            assert ours == theirs or (piece and piece.unknown), (name, tensor)
        inner = {parameter.removeprefix(moved.prefix): parameter for parameter in parameters}
        made = {to.removeprefix(moved.prefix) for tensor in disk for to, _ in moved.runtime(tensor)}
        if made != inner.keys():
            unlike[name] = [inner[one] for one in inner.keys() - made]
        for parameter, value in parameters.items():
            parts = [(disk[tensor], piece) for tensor, piece in base.find(parameter)]
            lost |= set() if parts else {name}
            if parts and not any(piece and (piece.unknown or piece.turned is None) for _, piece in parts):
                assert assembled(parts).shape == value.shape, (name, parameter)
        stands = {tensor: to for tensor in disk for to, _ in moved.runtime(tensor)}
        assert not [t for t, to in stands.items() if to != t and to in stands], f"{name}: one name of two tensors"
    assert unlike == {name: [tensor] for name, tensor in UNLIKE.items()}
    assert lost == {name for name in UNLIKE if name.startswith("Inkling2")}
    assert seen > 350


def assembled(parts: list[tuple[Any, Piece | None]]) -> Any:
    """The tensor that these make up."""
    import torch

    tensor, piece = parts[0]
    if piece is None:
        return tensor
    if piece.whole_on_disk:
        return tensor.chunk(piece.parts, piece.dim)[piece.part]
    if piece.turned:
        return tensor.mT
    grid: dict[int, list[Any]] = {}
    for tensor, piece in sorted(parts, key=lambda part: part[1].expert or 0 if part[1] else 0):
        assert piece
        grid.setdefault(piece.part, []).append(tensor)
    stacks = [torch.stack(grid[part]) if piece and piece.expert is not None else grid[part][0] for part in sorted(grid)]
    return torch.cat(stacks, piece.dim if piece else 0)


@pytest.mark.parametrize("name", MADE)
def test_the_pieces_make_the_parameters(name: str, source: Any, tmp_path: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    kind(kind.config_class(**{**SMALL, **MADE[name]})).save_pretrained(tmp_path)
    parameters = kind.from_pretrained(tmp_path).state_dict()
    disk = load_file(tmp_path / "model.safetensors")
    base = Whereabouts(disk, json.loads((tmp_path / "config.json").read_text()))
    used = set()
    for parameter, value in parameters.items():
        found = base.find(parameter)
        if not found and parameter == "lm_head.weight":
            continue  # tied
        used |= {tensor for tensor, _ in found}
        assert torch.equal(assembled([(disk[tensor], piece) for tensor, piece in found]), value), parameter
    assert used == disk.keys()
    if any("experts.0." in tensor for tensor in disk):
        assert any(piece and piece.expert for p in parameters for _, piece in base.find(p))
    every = [name for name in disk if base.find(name) != [(name, None)]]
    assert not every, "a name on disk is its own"


def test_parts_that_the_configuration_names(source: Any) -> None:
    import transformers
    from transformers import conversion_mapping
    from transformers import core_model_loading as loading

    text = transformers.MixtralConfig(**{**SMALL, **EXPERTS})
    sight = transformers.PixtralVisionConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    config = transformers.LlavaConfig(text_config=text, vision_config=sight)
    model = transformers.LlavaForConditionalGeneration(config)
    parameters = model.state_dict()
    disk = [*loading.revert_weight_conversion(model, parameters)]
    assert conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    base = Whereabouts(disk, {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]})
    assert all(base.find(name) for name in parameters)
    fused = "model.language_model.layers.0.mlp.experts.down_proj"
    assert [piece for _, piece in base.find(fused)] == [Piece(expert=e, dim=0) for e in range(3)]
    assert base.find(fused)[1][0] == "language_model.model.layers.0.block_sparse_moe.experts.1.w2.weight"


@pytest.mark.parametrize("name", PAIRS)
def test_names_of_transformers_4(name: str) -> None:
    names, config = PAIRS[name]["names"], PAIRS[name]["config"]
    pairs = names if isinstance(names, dict) else {one: one for one in names}
    base = Whereabouts(pairs.values(), config)
    turned = [(new, old) for new, old in pairs.items() if name.startswith("Qwen3VLMoe") and ".experts." in new]
    for new, old in pairs.items():
        assert base.find(new) == [(old, Piece(turned=None) if (new, old) in turned else None)]
        assert base.find(old) == base.find(new)
    inner = Whereabouts((old.removeprefix("model.") for old in pairs.values()), config)  # saved without its head
    if config["model_type"] in ("mixtral", "qwen3_moe", "olmoe"):
        assert all(inner.find(new)[0][0] == old.removeprefix("model.") for new, old in pairs.items())


def test_experts_that_are_stacked_on_disk() -> None:
    experts = "model.layers.0.mlp.experts"
    base = Whereabouts([f"{experts}.gate_up_proj", f"{experts}.down_proj", "model.layers.0.mlp.gate.weight"], MIXTRAL)
    old = "model.layers.0.block_sparse_moe"
    third = Piece(expert=3, part=1, parts=2, dim=1, whole_on_disk=True)
    assert base.find(f"{old}.experts.3.w3.weight") == [(f"{experts}.gate_up_proj", third)]
    assert base.find(f"{old}.experts.11.w2.weight") == [(f"{experts}.down_proj", Piece(11, whole_on_disk=True))]
    assert base.find(f"{old}.gate.weight") == [("model.layers.0.mlp.gate.weight", None)]
    assert base.find(f"{experts}.down_proj") == [(f"{experts}.down_proj", None)]
    assert base.find(f"{old}.experts.3.w4.weight") == []
    assert base.find("layers.0.block_sparse_moe.experts.3.w3.weight") == [(f"{experts}.gate_up_proj", third)]


def test_what_is_cut_on_disk() -> None:
    config = {"architectures": ["NomicBertModel"], "model_type": "nomic_bert"}
    base = Whereabouts(["encoder.layers.0.attn.Wqkv.weight", "encoder.layers.0.norm1.weight"], config)
    key = Piece(part=1, parts=3, whole_on_disk=True)
    assert base.find("layers.0.self_attn.k_proj.weight") == [("encoder.layers.0.attn.Wqkv.weight", key)]
    assert base.find("nomic_bert.layers.0.self_attn.k_proj.weight") == base.find("layers.0.self_attn.k_proj.weight")
    apart = Whereabouts([f"layers.0.self_attn.{x}_proj.weight" for x in "qkv"], config)
    found = apart.find("encoder.layers.0.attn.Wqkv.weight")
    assert found == [(f"layers.0.self_attn.{x}_proj.weight", Piece(part=i, parts=3)) for i, x in enumerate("qkv")]


def test_what_is_missing_or_twice_there_or_unknown() -> None:
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")]
    for one in (names[0], names[2], names[5]):
        base = Whereabouts([name for name in names if name != one], MIXTRAL)
        with pytest.raises(FitError, match="only some"):
            base.find("model.layers.0.mlp.experts.gate_up_proj")
    base = Whereabouts([*names, "model.norm.weight", "norm.weight"], MIXTRAL)
    assert base.find("norm.weight") == [("norm.weight", None)]
    sight = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    base = Whereabouts(["lm_head.weight", "language_model.lm_head.weight"], sight)
    assert base.find("lm_head.weight") == [("lm_head.weight", None)]
    with pytest.raises(FitError, match="as well as"):
        Whereabouts(["language_model.model.norm.weight", "model.language_model.norm.weight"], sight).find(
            "language_model.norm.weight"
        )
    both = {"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"], "model_type": "ernie4_5_vl_moe"}
    base = Whereabouts([f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(4)], both)
    found = base.find("model.language_model.layers.1.mlp.text_moe.experts.down_proj")
    assert [piece.unknown for _, piece in found if piece] == ["ErnieFuseAndSplitTextVisionExperts"] * 4


def test_unknown_models_keep_their_names() -> None:
    odd: list[dict[str, Any]] = [{}, {"model_type": 3, "architectures": "x"}, {"architectures": [None, {}]}]
    for config in [*odd, {"model_type": "rules"}, {"model_type": "llava", "text_config": "model_type"}]:
        base = Whereabouts(["model.layers.0.mlp.weight", "ln.LayerNorm.gamma"], config)
        assert base.find("model.layers.0.mlp.weight") == [("model.layers.0.mlp.weight", None)]
        assert base.find("ln.LayerNorm.weight") == [("ln.LayerNorm.gamma", None)]
        assert base.find("layers.0.mlp") == []


def test_hundred_thousand_names_are_quick() -> None:
    experts = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    names = [experts.format(layer, e, w) for layer in range(61) for e in range(546) for w in ("w1", "w2", "w3")]
    start = time.process_time()
    base = Whereabouts(names, MIXTRAL)
    assert len(base.find("model.layers.60.mlp.experts.gate_up_proj")) == 2 * 546
    assert time.process_time() - start < 2  # 0.3 s on the machine it was written on
