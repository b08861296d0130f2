"""What an attack on the GGUF support and a first user found, one small test for each finding.

Every file is made here (by GGUFWriter and safetensors) and goes through the command line; where a number is right now,
the oracle is the formula in float64 on what the files hold. The models are a llama, a mixtral and a gemma, each of two
blocks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import dora_tools as dt
from dora_tools.cli import main
from dora_tools.errors import UsageError

from .gguf_models import Floats, Weights, assert_close, by_hand, interleaved, merged_by_hand, read

Singles = NDArray[np.float32]
State = dict[str, Singles]
USAGE, INPUT, FIT, TARGET = 2, 3, 4, 5
WIDTH, HIDDEN, VOCABULARY, HEADS, KV_HEADS, KV, EXPERTS, BLOCKS = 32, 64, 48, 4, 2, 16, 4, 2
RANDOM = np.random.default_rng(0)
LAYER = "model.layers.0"
Q, K, V, UP = (f"{LAYER}.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"))
EXPERT = f"{LAYER}.block_sparse_moe.experts"
LEAVES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp", "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# --- models and adapters ---------------------------------------------------------------------------------------------


def r(*shape: int, scale: float = 1.0) -> Singles:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def hf_model(experts: bool = False, tied: bool = False) -> State:
    tensors = {"model.embed_tokens.weight": r(VOCABULARY, WIDTH), "model.norm.weight": 1 + r(WIDTH, scale=0.1)}
    if not tied:
        tensors["lm_head.weight"] = r(VOCABULARY, WIDTH)
    for block in range(BLOCKS):
        layer = f"model.layers.{block}"
        for leaf, rows in (("q", WIDTH), ("k", KV), ("v", KV), ("o", WIDTH)):
            tensors[f"{layer}.self_attn.{leaf}_proj.weight"] = r(rows, WIDTH)
        for leaf in ("input", "post_attention"):
            tensors[f"{layer}.{leaf}_layernorm.weight"] = 1 + r(WIDTH, scale=0.1)
        if experts:
            tensors[f"{layer}.block_sparse_moe.gate.weight"] = r(EXPERTS, WIDTH)
        for expert in range(EXPERTS if experts else 1):
            home = f"{layer}.block_sparse_moe.experts.{expert}" if experts else f"{layer}.mlp"
            gate, up, down = ("w1", "w3", "w2") if experts else ("gate_proj", "up_proj", "down_proj")
            tensors |= {f"{home}.{leaf}.weight": r(HIDDEN, WIDTH) for leaf in (gate, up)}
            tensors[f"{home}.{down}.weight"] = r(WIDTH, HIDDEN)
    return tensors


def converted(weights: Mapping[str, NDArray[Any]], architecture: str = "llama", fused: bool = False) -> Weights:
    """The tensors of the GGUF, in float64."""
    found: Weights = {}
    stacks: dict[str, list[Floats]] = {}
    for name, tensor in weights.items():
        array, module = tensor.astype(np.float64), name.removesuffix(".weight")
        if architecture == "gemma" and module.endswith("norm"):
            array = array + 1
        if module in OUTER:
            found[f"{OUTER[module]}.weight"] = array
            continue
        block, leaf = module.removeprefix("model.layers.").split(".", 1)
        place = f"blk.{block}.{LEAVES[leaf.rpartition('.')[2] if 'experts' in leaf else leaf]}.weight"
        if "experts" in leaf:
            stacks.setdefault(place, []).append(array)
        elif architecture == "llama" and place.endswith(("attn_q.weight", "attn_k.weight")):
            found[place] = interleaved(array, HEADS if "attn_q" in place else KV_HEADS)
        else:
            found[place] = array
    found |= {place: np.stack(stack) for place, stack in stacks.items()}
    for number in range(BLOCKS) if fused else ():
        parts = [found.pop(f"blk.{number}.attn_{leaf}.weight") for leaf in "qkv"]
        found[f"blk.{number}.attn_qkv.weight"] = np.concatenate(parts)
    return found


def lora(module: str, out: int, in_: int, scale: float = 1.0) -> State:
    """Factors of rank 2."""
    return {f"{module}.lora_A.weight": r(2, in_), f"{module}.lora_B.weight": r(out, 2, scale=scale)}


QLORA = lora(Q, WIDTH, WIDTH)  # what is merged where another matter is tested


@dataclass
class Work:
    """A folder, and the command line at work in it; ``out`` and ``said`` are what the last printed."""

    path: Path
    capfd: pytest.CaptureFixture[str]
    out: str = ""
    said: str = ""

    def gguf(
        self, values: Mapping[str, NDArray[Any]], name: str = "base", kind: str = "F32",
        architecture: str = "llama", **settings: Any,
    ) -> Path:  # fmt: skip
        """A GGUF with matrices in ``kind``; ``settings`` of the metadata, None to leave one out."""
        path = self.path / f"{name}.gguf"
        writer = GGUFWriter(path, architecture)
        usual = {"head_count": HEADS, "head_count_kv": KV_HEADS, "block_count": BLOCKS, "file_type": 0}
        for key, value in (usual | settings).items():
            home = {"block_count": architecture, "expert_count": architecture, "file_type": "general"}
            full = f"{home.get(key, f'{architecture}.attention')}.{key}"
            if isinstance(value, list):
                writer.add_array(full, value)
            elif value is not None:
                (writer.add_int32 if value < 0 else writer.add_uint32)(full, value)
        for tensor, array in values.items():
            stored = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
            writer.add_tensor(tensor, quants.quantize(array.astype(np.float32), stored), raw_dtype=stored)
        return self._written(writer, path)

    def gguf_adapter(self, values: Mapping[str, Singles], name: str = "own") -> Path:
        path = self.path / f"{name}.gguf"
        writer = GGUFWriter(path, "llama")
        for key, value in (("general.type", "adapter"), ("adapter.type", "lora")):
            writer.add_string(key, value)
        writer.add_float32("adapter.lora.alpha", 4)
        for tensor, array in values.items():
            writer.add_tensor(tensor, array)
        return self._written(writer, path)

    def _written(self, writer: GGUFWriter, path: Path) -> Path:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def model(self, tensors: Mapping[str, NDArray[Any]], name: str = "hf", **config: Any) -> Path:
        """A Hugging Face model."""
        folder = self.path / name
        folder.mkdir()
        kind = "mixtral" if any("experts" in n for n in tensors) else "llama"
        usual = {
            "model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"],
            "vocab_size": VOCABULARY, "hidden_size": WIDTH,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": BLOCKS,
            "tie_word_embeddings": "lm_head.weight" not in tensors, "num_local_experts": EXPERTS,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(usual | config))
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder

    def adapter(self, tensors: Mapping[str, NDArray[Any]] = QLORA, name: str = "adapter", **config: Any) -> Path:
        """A PEFT directory of rank 2 and scaling 2."""
        folder = self.path / name
        folder.mkdir()
        usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]}
        (folder / "adapter_config.json").write_text(json.dumps(usual | config))
        named = {f"base_model.model.{n}": np.ascontiguousarray(t) for n, t in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def call(self, *arguments: object) -> int:
        self.capfd.readouterr()
        code = main([str(a) for a in arguments])
        printed = self.capfd.readouterr()
        self.out, self.said = printed.out, printed.err
        return code

    def run(self, *arguments: object, out: str = "out.gguf") -> Path:
        assert self.call(*arguments, "-o", self.path / out) == 0, self.said
        return self.path / out

    def refuse(self, code: int, words: list[str], *arguments: object, out: str = "out.gguf") -> None:
        """Fails with this code and all these words, leaving nothing at OUT or beside it."""
        there = sorted(self.path.rglob("*"))
        assert self.call(*arguments, "-o", self.path / out) == code, self.said
        assert all(word in self.said for word in words), self.said
        assert "Traceback" not in self.said
        assert sorted(self.path.rglob("*")) == there, "something was left behind"


@pytest.fixture
def work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Work:
    return Work(tmp_path, capfd)


def double(weights: Mapping[str, NDArray[Any]]) -> Weights:
    return {name: tensor.astype(np.float64) for name, tensor in weights.items()}


def assert_merged(out: Path, weights: Mapping[str, NDArray[Any]], adapter: Path, **layout: Any) -> None:
    """Every tensor of the GGUF is the merge in float64."""
    want = converted(merged_by_hand(double(weights), by_hand(adapter), conv1d=False), **layout)
    found = read(out).values
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert_close(found[name], tensor, name)


# --- 1: what does not fit is refused, and not merged into other rows -------------------------------------------------


def of_experts(rows: int, *experts: int) -> State:
    return {n: t for e in experts for n, t in lora(f"{EXPERT}.{e}.w1", rows, WIDTH).items()}


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (of_experts(HIDDEN // 2, 1), ["64 rows", "makes 32"]),
        (of_experts(HIDDEN // 2, 0, 1, 2, 3), ["64 rows", "makes 32"]),
        (of_experts(HIDDEN * 2, 1), ["64 rows", "makes 128"]),
        (of_experts(HIDDEN, 0) | of_experts(HIDDEN // 2, 2), ["64 rows", "makes 32"]),
        (of_experts(HIDDEN, 4), ["4 experts", "a number 4"]),
    ],
    ids=["half", "half of all", "twice", "half of one", "a fifth"],
)
def test_experts_of_another_size(command: str, tensors: State, words: list[str], work: Work) -> None:
    base = work.gguf(converted(hf_model(experts=True)), expert_count=EXPERTS)
    where = ("--base", base) if command == "merge" else ("--to", "gguf", "--like", base)
    work.refuse(FIT, ["blk.0.ffn_gate_exps", *words], command, work.adapter(tensors), *where)


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize(("part", "rows", "own"), [("k", WIDTH, KV), ("v", 8, KV), ("q", 48, WIDTH), ("q", 40, WIDTH)])
def test_parts_of_a_fused_projection_of_another_size(command: str, part: str, rows: int, own: int, work: Work) -> None:
    base = work.gguf(converted(hf_model(), fused=True))
    where = ("--base", base) if command == "merge" else ("--to", "gguf", "--like", base)
    adapter = work.adapter(lora(f"{LAYER}.self_attn.{part}_proj", rows, WIDTH))
    work.refuse(FIT, [f"the adapter's {part} has {rows} rows", f"of the base {own}"], command, adapter, *where)


@pytest.mark.parametrize("fused", [True, False])
def test_parts_of_the_right_size(fused: bool, work: Work) -> None:
    """The control: in the order of the rows, beside the others."""
    model = hf_model(experts=True)
    parts = {**lora(Q, WIDTH, WIDTH), **lora(V, KV, WIDTH)} if fused else {}
    adapter = work.adapter({**parts, **lora(K, KV, WIDTH), **of_experts(HIDDEN, 1, 3)})
    base = work.gguf(converted(model, fused=fused), expert_count=EXPERTS)
    assert_merged(work.run("merge", adapter, "--base", base), model, adapter, fused=fused)


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize(
    ("module", "out", "in_", "place"),
    [(UP, WIDTH, HIDDEN, "blk.0.ffn_up"), (K, WIDTH, KV, "blk.0.attn_k"), ("lm_head", WIDTH, VOCABULARY, "output")],
)
def test_no_update_is_turned(command: str, module: str, out: int, in_: int, place: str, work: Work) -> None:
    """A GGUF stores (out, in) throughout, so the transposed shape is that of another model."""
    base = work.gguf(converted(hf_model()))
    where = ("--base", base) if command == "merge" else ("--to", "gguf", "--like", base)
    work.refuse(FIT, [f"{place}:", "right base"], command, work.adapter(lora(module, out, in_)), *where)


SQUARE = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "saved", "words"),
    [
        ({"model.norm.weight": r(WIDTH), "norm.weight": r(WIDTH)}, ["norm"], ["model.norm and norm", "output_norm"]),
        ({f"{SQUARE}.weight": r(WIDTH, WIDTH)}, ["q_proj"], [Q, SQUARE, "both blk.0.attn_q"]),
        (lora(SQUARE, WIDTH, WIDTH), None, [Q, SQUARE, "both blk.0.attn_q"]),
    ],
    ids=["two saved", "LoRA and saved", "two LoRAs"],
)
def test_two_names_for_one_place(tensors: State, saved: list[str] | None, words: list[str], work: Work) -> None:
    adapter = work.adapter(QLORA | tensors, modules_to_save=saved)
    work.refuse(FIT, words, "merge", adapter, "--base", work.gguf(converted(hf_model())))


@pytest.mark.parametrize("shape", [(VOCABULARY, WIDTH + 8), (VOCABULARY + 8, WIDTH), (VOCABULARY,)])
def test_an_untied_head_has_the_shape_of_the_embedding(shape: tuple[int, ...], work: Work) -> None:
    adapter = work.adapter({**QLORA, "lm_head.weight": r(*shape)}, modules_to_save=["lm_head"])
    base = work.gguf(converted(hf_model(tied=True)))
    work.refuse(FIT, ["lm_head.weight", str(list(shape)), "[48, 32]"], "merge", adapter, "--base", base, "--untie")


def test_a_saved_norm_has_the_size_of_the_base_s(work: Work) -> None:
    adapter = work.adapter({**QLORA, "model.norm.weight": r(WIDTH + 8)}, modules_to_save=["norm"])
    words = ["model.norm.weight", "[40]", "output_norm.weight", "[32]"]
    work.refuse(FIT, words, "merge", adapter, "--base", work.gguf(converted(hf_model())))


# --- 2: extract from two GGUFs ---------------------------------------------------------------------------------------


def tuned(model: State) -> tuple[State, Floats]:
    """The model with an update of rank 1 of q, and that update."""
    update = np.outer(r(WIDTH), r(WIDTH))
    return model | {f"{Q}.weight": model[f"{Q}.weight"] + update}, update.astype(np.float64)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_changed_norms_are_not_left_out(architecture: str, work: Work) -> None:
    """And with --save-rest they are the Hugging Face model's: gemma's GGUFs hold them plus one."""
    model = hf_model(tied=architecture == "gemma")
    after, update = tuned(model)
    changed = ["model.norm.weight", f"{LAYER}.input_layernorm.weight"]
    after |= {name: 3 * model[name] for name in changed}
    before, later = (
        work.gguf(converted(m, architecture), name, architecture=architecture)
        for m, name in ((model, "before"), (after, "after"))
    )
    command = ("extract", "--base", before, "--tuned", later, "--rank", 4)
    work.refuse(FIT, ["norm.weight", "differ", "--save-rest"], *command, out="refused")
    out = work.run(*command, "--save-rest", out="extracted")
    found = by_hand(out)
    assert sorted(found.saved) == sorted(changed)
    for name in changed:
        np.testing.assert_allclose(found.saved[name], after[name].astype(np.float64), atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert {"norm", "input_layernorm"} <= {name.rpartition(".")[2] for name in config["modules_to_save"]}
    module = found.modules[Q]
    assert found.modules.keys() == {Q}
    np.testing.assert_allclose(module.scaling * (module.b @ module.a), update, atol=1e-4)
    merged = read(work.run("merge", out, "--base", before)).values
    for name, tensor in read(later).values.items():
        np.testing.assert_allclose(merged[name], tensor, atol=1e-4)


def test_a_changed_fused_projection_is_not_left_out(work: Work) -> None:
    model = hf_model()
    after = tuned(model)[0] | {f"{UP}.weight": model[f"{UP}.weight"] + np.outer(r(HIDDEN), r(WIDTH))}
    before, later = (work.gguf(converted(m, fused=True), n) for m, n in ((model, "before"), (after, "after")))
    words = ["blk.0.attn_qkv.weight", "fused", "Hugging Face model"]
    work.refuse(INPUT, words, "extract", "--base", before, "--tuned", later, "--rank", 4, out="refused")


# --- 3: head counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "fused", "heads", "words"),
    [
        ("q", False, {"head_count": [4, 0], "head_count_kv": [2, 0]}, ["block 1", "no attention heads"]),
        ("v", True, {"head_count_kv": -2}, ["block 1", "no attention heads"]),
        ("v", True, {"head_count_kv": None}, ["64 rows", "4 heads and twice 4"]),
        ("v", True, {"head_count": 3}, ["64 rows", "3 heads and twice 2"]),
        ("v", True, {"head_count": 32}, ["64 rows", "32 heads and twice 2"]),
        ("q", False, {"head_count": 3}, ["3 heads"]),
        ("q", False, {"head_count": 32}, ["32 heads"]),
        ("q", False, {"head_count": None}, ["how many heads", "llama.attention.head_count"]),
    ],
)
def test_head_counts_that_do_not_fit(
    leaf: str, fused: bool, heads: dict[str, Any], words: list[str], work: Work
) -> None:
    rows = WIDTH if leaf == "q" else KV
    adapter = work.adapter(lora(f"model.layers.1.self_attn.{leaf}_proj", rows, WIDTH))
    work.refuse(FIT, words, "merge", adapter, "--base", work.gguf(converted(hf_model(), fused=fused), **heads))


def test_a_block_beyond_the_head_counts(work: Work) -> None:
    base = work.gguf(converted(hf_model()), head_count=[4, 4])
    adapter = work.adapter(lora("model.layers.7.self_attn.q_proj", WIDTH, WIDTH))
    work.refuse(FIT, ["2 blocks", "a block 7"], "merge", adapter, "--base", base)


# --- 4: templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_template_with_other_matrices_than_the_base(kind: str, work: Work) -> None:
    model, adapter = hf_model(), work.adapter()
    values, missing = converted(model), "model.layers.1.mlp.up_proj.weight"
    lacking = work.model({n: t for n, t in model.items() if n != missing})
    template = work.gguf(values, "template", kind)
    words = ["blk.1.ffn_up.weight", "[64, 32]", "nothing in the base"]
    work.refuse(FIT, words, "merge", adapter, "--base", lacking, "--like", template)
    deeper = values | {n.replace("blk.1", "blk.2"): v for n, v in values.items() if "blk.1" in n}
    template = work.gguf(deeper, "deeper", kind, block_count=3)
    words = ["blk.2.", "nothing in the base"]
    work.refuse(FIT, words, "merge", adapter, "--base", work.model(model, "whole"), "--like", template)
    fewer = work.gguf({n: v for n, v in values.items() if "blk.1.ffn_up" not in n}, "fewer", kind)
    work.refuse(FIT, [missing], "merge", adapter, "--base", work.path / "whole", "--like", fewer)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    ("dimensions", "factor", "words"),
    [(1, 3, ["attn_norm.weight of the template is not", "vectors"]), (2, 2, ["0.50 times as large", "same model"])],
    ids=["norms", "matrices"],
)
def test_a_template_of_the_model_before_its_training(
    dimensions: int, factor: float, words: list[str], kind: str, work: Work
) -> None:
    """The cosine does not see a factor, and of vectors nothing was compared."""
    model = hf_model()
    trained = work.model({n: t * factor if t.ndim == dimensions else t for n, t in model.items()})
    template = work.gguf(converted(model), "template", kind)
    work.refuse(FIT, words, "merge", work.adapter(), "--base", trained, "--like", template)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_base_in_float64_becomes_f32(kind: str, work: Work) -> None:
    """llama.cpp loads F64 and crashes on it."""
    model, adapter = hf_model(), work.adapter()
    base, template = work.model(double(model)), work.gguf(converted(model), "template", kind)
    out = work.run("merge", adapter, "--base", base, "--like", template)
    assert {*read(out).types.values()} == {"F32"}
    assert_merged(out, model, adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float32])
def test_a_quantised_base_is_refused_with_a_template_too(dtype: torch.dtype, work: Work) -> None:
    model, adapter = hf_model(), work.adapter()
    base = work.model(model, quantization_config={"quant_method": "int8"})
    tensors = {n: torch.from_numpy(t) for n, t in model.items()}
    scaled = {n: (30 * t).to(dtype) if t.ndim > 1 else t for n, t in tensors.items()}
    scaled |= {f"{Q}.weight_scale_inv": torch.ones(1, 1)} if dtype == torch.float32 else {}
    save_torch(scaled, base / "model.safetensors")
    template, words = work.gguf(converted(model), "template"), ["quantised (int8)", "dequantised copy"]
    work.refuse(INPUT, words, "merge", adapter, "--base", base, "--like", template)
    work.refuse(INPUT, words, "merge", adapter, "--base", base, out="hf-out")


def test_a_weight_of_three_dimensions(work: Work) -> None:
    model = hf_model()
    base = work.model(model | {f"{Q}.weight": model[f"{Q}.weight"][..., None].copy()})
    template = work.gguf(converted(model), "template", "Q8_0")
    words = [f"{Q}.weight", "[32, 32, 1]"]
    work.refuse(FIT, words, "merge", work.adapter(), "--base", base, "--like", template)


def test_keep_means_the_types_of_the_template(work: Work) -> None:
    model, adapter = hf_model(), work.adapter()
    template = work.gguf(converted(model), "template", "Q4_0", file_type=2)
    command = ("merge", adapter, "--base", work.model(model), "--like", template, "--gguf-type", "keep")
    found, before = read(work.run(*command)), read(template)
    assert found.types == before.types
    assert found.kv == before.kv
    want = converted(merged_by_hand(double(model), by_hand(adapter), conv1d=False))
    for name, stored in found.tensors.items():
        if stored.kind == "Q4_0":
            exact = quants.quantize(want[name].astype(np.float32), GGMLQuantizationType.Q4_0)
            assert stored.raw == exact.tobytes(), name
    touched = [n for n in before.tensors if found.tensors[n] != before.tensors[n]]
    assert touched == ["blk.0.attn_q.weight"]


# --- 5: adapters as GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lora("model.layers.9.self_attn.q_proj", WIDTH, WIDTH), ["blk.9.attn_q.weight", "no place"]),
        (lora(Q, WIDTH + 8, WIDTH), ["blk.0.attn_q", "40 rows"]),
        (lora(f"{LAYER}.input_layernorm", 1, WIDTH), ["blk.0.attn_norm", "[32]"]),
    ],
    ids=["block", "shape", "norm"],
)
def test_an_export_that_does_not_fit_the_base(tensors: State, words: list[str], work: Work) -> None:
    base, adapter = work.gguf(converted(hf_model())), work.adapter(tensors)
    work.refuse(FIT, words, "convert", adapter, "--to", "gguf", "--like", base)
    work.refuse(FIT, [], "convert", adapter, "--to", "gguf", "--base", work.model(hf_model()))


def test_an_expert_that_the_hugging_face_model_lacks(work: Work) -> None:
    base, adapter = work.model(hf_model(experts=True)), work.adapter(of_experts(HIDDEN, 4))
    work.refuse(FIT, [f"{EXPERT}.4", "right base"], "convert", adapter, "--to", "gguf", "--base", base)


def test_an_architecture_that_the_base_contradicts(work: Work) -> None:
    command = ("convert", work.adapter(), "--to", "gguf", "--arch", "qwen2", "--base")
    work.refuse(TARGET, ["--arch says qwen2", "'llama'"], *command, work.model(hf_model()))
    work.refuse(TARGET, ["qwen2", "'llama'"], *command, work.gguf(converted(hf_model())))


def test_positions_take_no_adapter(work: Work) -> None:
    values = {"token_embd.weight": r(40, WIDTH), "output.weight": r(40, WIDTH), "output_norm.weight": r(WIDTH)}
    base = work.gguf(values | {"position_embd.weight": r(20, WIDTH)}, architecture="gpt2", block_count=1)
    stem = "transformer.wpe.lora_embedding_"
    adapter = work.adapter({f"{stem}A": r(2, 20), f"{stem}B": r(WIDTH, 2)})
    work.refuse(TARGET, ["transformer.wpe", "Merge"], "convert", adapter, "--to", "gguf", "--like", base)


def test_an_adapter_for_a_fused_base_comes_back(work: Work) -> None:
    """It is of rank 6 (q | k | v), and ours; merged into its base and as PEFT it is what it was."""
    model = hf_model()
    adapter = work.adapter({**QLORA, **lora(K, KV, WIDTH), **lora("model.layers.1.self_attn.v_proj", KV, WIDTH)})
    base = work.gguf(converted(model, fused=True))
    own = work.run("convert", adapter, "--to", "gguf", "--like", base, out="own.gguf")
    assert {n.rpartition(".")[0] for n in read(own).tensors} == {f"blk.{i}.attn_qkv.weight" for i in range(2)}
    assert_merged(work.run("merge", own, "--base", base), model, adapter, fused=True)
    back = work.run("convert", own, "--to", "peft", "--base", base, out="back")
    found, want = by_hand(back).modules, by_hand(adapter).modules
    assert want.keys() <= found.keys()
    for module, update in found.items():
        product = update.scaling * (update.b @ update.a)
        if module in want:
            assert_close(product, want[module].scaling * (want[module].b @ want[module].a), module, 1e-12)
        else:
            assert not product.any(), module
    assert_merged(work.run("merge", back, "--base", base, out="again.gguf"), model, adapter, fused=True)


GATE = "blk.0.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("target", "a", "b", "experts", "words"),
    [
        (GATE, (2, WIDTH), (HIDDEN, 2), True, ["blk.0.ffn_gate_exps", "other dimensions"]),
        (GATE, (5, 2, WIDTH), (5, HIDDEN, 2), True, ["right base"]),
        ("blk.{}.attn_q.weight", (2, WIDTH), (WIDTH, 2), False, ["blk.{}.attn_q is no tensor"]),
        ("blk.9.ffn_up.weight", (2, WIDTH), (HIDDEN, 2), False, ["right base"]),
    ],
    ids=["2-D on a stack", "5 experts", "braces", "block"],
)
@pytest.mark.parametrize("command", ["convert", "merge"])
def test_a_gguf_adapter_that_does_not_fit(
    command: str, target: str, a: tuple[int, ...], b: tuple[int, ...], experts: bool, words: list[str], work: Work
) -> None:
    adapter = work.gguf_adapter({f"{target}.lora_a": r(*a), f"{target}.lora_b": r(*b)})
    to = ("--to", "peft") if command == "convert" else ()
    work.refuse(FIT, words, command, adapter, *to, "--base", work.model(hf_model(experts)), out="out")


# --- 6: odd names ----------------------------------------------------------------------------------------------------

ODD = {
    "Arabic digits": "model.layers.\u0660.self_attn.q_proj", "00": "model.layers.00.self_attn.q_proj",
    "5000 digits": f"model.layers.{'9' * 5000}.self_attn.q_proj", "bert": "bert.layers.0.self_attn.q_proj",
    "transformer": "transformer.layers.0.self_attn.q_proj",
}  # fmt: skip


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize("name", ODD)
def test_odd_names_have_no_place(name: str, command: str, work: Work) -> None:
    base, adapter = work.gguf(converted(hf_model())), work.adapter(lora(ODD[name], WIDTH, WIDTH))
    where = ("--base", base) if command == "merge" else ("--to", "gguf", "--like", base)
    work.refuse(FIT, ["no place", "'llama'", ODD[name][-30:]], command, adapter, *where)


def test_control_characters_do_not_reach_the_terminal(work: Work) -> None:
    escape = "\x1b[2J\x07"
    values = converted(hf_model())
    name = f"blk.0.attn_q{escape}.weight"
    evil = work.gguf(values | {name: values["blk.0.attn_q.weight"]}, "evil")
    adapters = [
        work.adapter(lora(f"{LAYER}.self_attn.{escape}_proj", WIDTH, WIDTH)),
        work.gguf_adapter({f"{name}.lora_a": r(2, WIDTH), f"{name}.lora_b": r(WIDTH, 2)}),
    ]
    for adapter in adapters:
        work.refuse(FIT, ["x1b"], "merge", adapter, "--base", work.path / "evil.gguf")
        assert "\x1b" not in work.said and "\x07" not in work.said
    work.refuse(FIT, ["x1b"], "merge", work.adapter(name="a"), "--base", work.model(hf_model()), "--like", evil)
    assert "\x1b" not in work.said and "\x07" not in work.said


# --- 7: is the adapter still there? ----------------------------------------------------------------------------------


def half_rounded(found: Floats, want: Floats) -> None:
    """Every value the F16 nearest to what is wanted."""
    np.testing.assert_allclose(found, want, rtol=2**-11 * 1.01, atol=2**-25)


def test_a_fresh_dora_on_f16_is_written(work: Work) -> None:
    """B = 0 and m = ‖W‖: what it changes is float32's rounding of m alone, and the base is the right result."""
    model = {n: t.astype(np.float16).astype(np.float32) for n, t in hf_model().items()}
    fresh = QLORA | {f"{Q}.lora_B.weight": np.zeros((WIDTH, 2), np.float32)}
    norms = np.linalg.norm(model[f"{Q}.weight"], axis=1).astype(np.float32)
    adapter = work.adapter({**fresh, f"{Q}.lora_magnitude_vector": norms}, use_dora=True)
    base = work.gguf(converted(model), kind="F16")
    out = read(work.run("merge", adapter, "--base", base))
    assert out.types == read(base).types
    want = converted(merged_by_hand(double(model), by_hand(adapter), conv1d=False))
    half_rounded(out.values["blk.0.attn_q.weight"], want["blk.0.attn_q.weight"])


@pytest.mark.parametrize("case", ["tiny", "1 and -1"])
def test_an_adapter_that_hardly_changes_a_quantised_base(case: str, work: Work) -> None:
    base = work.gguf(converted(hf_model()), kind="Q4_0")
    adapter = work.adapter(lora(Q, WIDTH, WIDTH, 1e-9) if case == "tiny" else QLORA)
    command = (adapter,) if case == "tiny" else (adapter, adapter, "--strength", "1", "--strength", "-1")
    out = read(work.run("merge", *command, "--base", base))
    assert "hardly changes" in work.out + work.said
    before = read(base)
    for name, stored in out.tensors.items():
        if name != "blk.0.attn_q.weight":
            assert stored == before.tensors[name]
    found, want = out.tensors["blk.0.attn_q.weight"], before.values["blk.0.attn_q.weight"]
    assert found.kind == "Q8_0"
    largest = np.abs(want.reshape(-1, 32)).max(1)
    assert (np.abs((found.values - want).reshape(-1, 32)).max(1) <= 0.58 / 127 * largest).all()


def test_allow_nonfinite_works_alone(work: Work) -> None:
    infinite = {n: t.copy() for n, t in QLORA.items()}
    infinite[f"{Q}.lora_A.weight"][0, 0] = np.inf
    adapter, base = work.adapter(infinite), work.gguf(converted(hf_model()))
    command = ("merge", adapter, "--base", base)
    work.refuse(INPUT, ["--allow-nonfinite"], *command)
    out, before = read(work.run(*command, "--allow-nonfinite")).values, read(base).values
    assert not np.isfinite(out["blk.0.attn_q.weight"][:, 0]).any()
    assert all(np.array_equal(out[n], v) for n, v in before.items() if n != "blk.0.attn_q.weight")


def test_an_overflow_of_f16_names_the_option_that_helps(work: Work) -> None:
    model, adapter = hf_model(), work.adapter(lora(Q, WIDTH, WIDTH, 1e5))
    model = {n: t.astype(np.float16).astype(np.float32) for n, t in model.items()}
    base = work.gguf(converted(model), kind="F16")
    words = ["blk.0.attn_q.weight", "65504", "--gguf-type bf16 or f32"]
    work.refuse(FIT, words, "merge", adapter, "--base", base)
    assert_merged(work.run("merge", adapter, "--base", base, "--gguf-type", "f32"), model, adapter)
    wide = read(work.run("merge", adapter, "--base", base, "--gguf-type", "bf16", out="bf16.gguf"))
    assert {*wide.types.values()} == {"BF16", "F32"}
    want = converted(merged_by_hand(double(model), by_hand(adapter), conv1d=False))
    for name, values in wide.values.items():
        np.testing.assert_allclose(values, want[name], rtol=2**-8 * 1.01)


# --- 8: the options --------------------------------------------------------------------------------------------------


def test_an_empty_type(work: Work) -> None:
    base = work.gguf(converted(hf_model()))
    work.refuse(USAGE, ["--gguf-type is empty"], "merge", work.adapter(), "--base", base, "--gguf-type", "")


@pytest.mark.parametrize(("given", "meant", "number"), [("Q4_0", "q4_0", 2), ("q4_k", "q4_k_m", 15)])
def test_types_as_llama_quantize_spells_them(given: str, meant: str, number: int, work: Work) -> None:
    model, adapter = hf_model(), work.adapter()
    command = ("merge", adapter, "--base", work.gguf(converted(model)), "--gguf-type")
    found = work.run(*command, given, out="given.gguf")
    assert found.read_bytes() == work.run(*command, meant, out="meant.gguf").read_bytes()
    assert read(found).fields["general.file_type"] == number
    want = converted(merged_by_hand(double(model), by_hand(adapter), conv1d=False))
    for name, stored in read(found).tensors.items():
        exact = quants.quantize(want[name].astype(np.float32), GGMLQuantizationType[stored.kind])
        assert stored.raw == exact.tobytes(), name


@pytest.mark.parametrize(("choice", "kind"), [("auto", "Q8_0"), ("keep", "Q4_0")])
def test_an_untied_saved_head_on_a_quantised_embedding(choice: str, kind: str, work: Work) -> None:
    head = r(VOCABULARY, WIDTH)
    adapter = work.adapter({**QLORA, "lm_head.weight": head}, modules_to_save=["lm_head"])
    base = work.gguf(converted(hf_model(tied=True)), kind="Q4_0")
    command = ("merge", adapter, "--base", base, "--gguf-type", choice)
    work.refuse(TARGET, ["--untie", "token_embd.weight", "output.weight"], *command)
    out, before = read(work.run(*command, "--untie")), read(base)
    assert out.types == before.types | {"output.weight": kind, "blk.0.attn_q.weight": kind}
    assert out.tensors["token_embd.weight"] == before.tensors["token_embd.weight"]
    exact = quants.quantize(head, GGMLQuantizationType[kind])
    assert out.tensors["output.weight"].raw == exact.tobytes()


def test_a_modelfile_names_one_line(work: Work) -> None:
    """What follows a line break would be an instruction to Ollama."""
    command = ("merge", work.adapter(), "--base", work.gguf(converted(hf_model())), "--modelfile")
    work.refuse(USAGE, ["Modelfile", "line breaks", r"a\nPARAMETER"], *command, out="a\nPARAMETER stop x.gguf")


def split(work: Work) -> list[Path]:
    writer = GGUFWriter(work.path / "base.gguf", "llama", split_max_tensors=8)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_block_count(BLOCKS)
    for name, array in converted(hf_model()).items():
        writer.add_tensor(name, array.astype(np.float32))
    work._written(writer, work.path)
    return sorted(work.path.glob("base-*.gguf"))


def test_a_modelfile_names_one_file(work: Work) -> None:
    parts, adapter = split(work), work.adapter()
    assert len(parts) > 1
    for extra in ((), ("--dry-run",)):
        words = ["Ollama", "llama-gguf-split --merge"]
        work.refuse(USAGE, words, "merge", adapter, "--base", parts[0], "--modelfile", *extra)


def test_an_adapter_is_no_base(work: Work) -> None:
    own = work.gguf_adapter({"blk.0.attn_q.weight.lora_a": r(2, WIDTH), "blk.0.attn_q.weight.lora_b": r(WIDTH, 2)})
    work.refuse(INPUT, ["own.gguf is a GGUF adapter"], "merge", work.adapter(), "--base", own)
    work.refuse(INPUT, ["own.gguf is a GGUF adapter"], "convert", own, "--to", "peft", "--base", own, out="peft")


def test_the_manifest_knows_its_base(work: Work) -> None:
    model = hf_model()
    base = work.gguf(converted(model), kind="F16")
    other = work.gguf(converted(model), "other", "F16", head_count_kv=[2, 2])
    digests = []
    for number, path in enumerate((base, other, shutil.copy(base, work.path / "copy.gguf"))):
        adapter = work.path / "adapter" if number else work.adapter()
        text = (work.run("merge", adapter, "--base", path, out=f"out{number}") / "dora_tools.json").read_text()
        assert "None" not in text
        (file,) = json.loads(text)["base"]["files"].values()
        assert re.fullmatch(r"[0-9a-f]{64}", file["metadata_sha256"])
        assert file["size"] == Path(path).stat().st_size
        digests.append(file["metadata_sha256"])
    assert digests[0] == digests[2] != digests[1]
    like = work.run("merge", adapter, "--base", work.model(model), "--like", base, out="like.gguf")
    assert like.is_file()


def test_a_tokenizer_beside_the_adapter_is_mentioned(work: Work) -> None:
    adapter, base = work.adapter(), work.gguf(converted(hf_model()))
    work.run("merge", adapter, "--base", base, out="without.gguf")
    assert "tokenizer beside it" not in work.said
    (adapter / "tokenizer_config.json").write_text("{}")
    work.run("merge", adapter, "--base", base, out="with.gguf")
    assert "tokenizer beside it" in work.said
    assert (work.path / "with.gguf").read_bytes() == (work.path / "without.gguf").read_bytes()


def norms_of(values: Floats, update: Floats) -> Singles:
    return np.asarray(np.linalg.norm(values + update, axis=1), np.float32)


@pytest.mark.parametrize("command", ["to-lora", "rescale"])
@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_operations_write_a_gguf_adapter_for_a_base(command: str, kind: str, work: Work) -> None:
    model, small = hf_model(), lora(Q, WIDTH, WIDTH, 0.3)
    plain = work.adapter(small, "plain")
    update = by_hand(plain).modules[Q]
    product = update.scaling * (update.b @ update.a)
    magnitude = norms_of(model[f"{Q}.weight"].astype(np.float64), product) * np.float32(1.1)
    dora = {**small, f"{Q}.lora_magnitude_vector": magnitude}
    adapter = work.adapter(dora, "dora", use_dora=True) if command == "to-lora" else plain
    base = work.gguf(converted(model)) if kind == "gguf" else work.model(model)
    arguments = (command, adapter, "--rank", WIDTH if command == "to-lora" else 4, "--to", "gguf")
    work.refuse(USAGE, ["--to gguf needs --base"], *arguments)
    own = read(work.run(*arguments, "--base", base))
    assert set(own.tensors) == {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}
    a, b = own.values["blk.0.attn_q.weight.lora_a"], own.values["blk.0.attn_q.weight.lora_b"]
    found = own.fields["adapter.lora.alpha"] / a.shape[0] * (b @ a)
    before = double(model)
    want = merged_by_hand(before, by_hand(adapter), conv1d=False)[f"{Q}.weight"] - before[f"{Q}.weight"]
    assert_close(found, interleaved(want, HEADS), Q, 1e-5)


def test_lazy_tensors_are_of_hugging_face_models(work: Work) -> None:
    adapter, base = work.adapter(), work.gguf(converted(hf_model()))
    with pytest.raises(UsageError, match="GGUF base is merged into a file"):
        dt.merged(adapter, base)
