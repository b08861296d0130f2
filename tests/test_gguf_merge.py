"""Merging into GGUF files and writing GGUF adapters, against oracles that share no code with what they judge.

Those are: the logits that PEFT computed (expected.npz), llama.cpp, transformers' loader of GGUF files, and the merge in
float64 by ``gguf_models``. Of every comparison of logits the control (the base against the adapted model, so what a
merge that does nothing would score) is at least 0.02.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dora_tools import api
from dora_tools.cli import main

from . import gguf_models, llamacpp
from .gguf_models import ADAPTERS, FAMILIES, Family, Floats, by_hand, family, interleaved, merged_by_hand, read, rewrite
from .llamacpp import log_probabilities, nmse

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")
FIXTURES = gguf_models.GGUF.parent

EXACT, ROUNDED_GELU = 1e-9, 1e-8  # NMSE of logits, without and with llama.cpp's GELU in float16 (see make_gguf.py)
CONTROL = 0.02
USAGE, INPUT, FIT, TARGET = 2, 3, 4, 5
LORAS = [(name, adapter) for name, adapter in ADAPTERS if adapter != "dora"]
TIED = [("llama-tied", "embed"), ("llama-tied", "head")]
WHOLE = [("qwen2", "bias"), ("qwen2", "norms"), ("gemma3", "norms")]  # what an adapter GGUF cannot hold
EXPORTED = [case for case in LORAS if case not in TIED + WHOLE]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The merge of a fixture's adapter into its base.gguf, each made once, by the command line."""
    folder = tmp_path_factory.mktemp("merged")

    def merged(name: str, adapter: str) -> Path:
        path, home = folder / f"{name}-{adapter}.gguf", family(name).folder
        if not path.exists():
            untie = ["--untie"] if (name, adapter) in TIED else []
            assert main(["merge", str(home / adapter), "--base", str(home / "base.gguf"), "-o", str(path), *untie]) == 0
        return path

    return merged


Shelf = Callable[[str, str], Path]
Computed = Callable[[str, str], Floats]


@pytest.fixture(scope="session")
def computed(shelf: Shelf) -> Computed:
    """What llama.cpp computes from such a merge, each once."""
    return cache(lambda name, adapter: log_probabilities(shelf(name, adapter), family(name).tokens))


def run(*arguments: str | Path, code: int = 0) -> None:
    assert main([str(a) for a in arguments]) == code


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with this code, all these words, and leave nothing in (or as) ``out``."""

    def refused(code: int, words: list[str], *arguments: str | Path, out: Path) -> str:
        there = sorted(out.parent.rglob("*")) if out.parent.exists() else []
        capfd.readouterr()
        found = main([*(str(a) for a in arguments), "-o", str(out)])
        said = capfd.readouterr().err
        assert found == code, said
        assert all(word in said for word in words), said
        assert "Traceback" not in said
        assert (sorted(out.parent.rglob("*")) if out.parent.exists() else []) == there, "something was left behind"
        return said

    return refused


Refuse = Callable[..., str]


def oracle(home: Family, adapter: Path, permute: bool = True, strength: float = 1) -> dict[str, Floats]:
    """All tensors of the merged GGUF, from the Hugging Face weights, in float64."""
    merged = merged_by_hand(home.weights, by_hand(adapter), home.architecture == "gpt2", strength)
    return home.converted(merged, permute)


def assert_tensors(found: Mapping[str, Floats], want: Mapping[str, Floats], bar: float = 1e-6) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        gguf_models.assert_close(found[name], tensor, name, bar)


# --- 1: merges, every family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_converter_by_hand_is_the_converter(name: str) -> None:
    """The oracle's own control: from the Hugging Face weights it gives base.gguf, and not without π."""
    home = family(name)
    found, want = home.converted(home.weights), read(home.base).values
    assert found.keys() == want.keys()
    for tensor, values in want.items():
        np.testing.assert_allclose(found[tensor], values, rtol=1e-7, atol=1e-7)
    plain = home.converted(home.weights, permute=False)
    assert (
        (not np.array_equal(plain["blk.0.attn_q.weight"], want["blk.0.attn_q.weight"])) is home.permutes
        if ("blk.0.attn_q.weight" in want)
        else not home.permutes
    )


@pytest.mark.parametrize(("name", "adapter"), ADAPTERS)
def test_every_tensor_is_the_merge_by_hand(name: str, adapter: str, shelf: Shelf) -> None:
    home = family(name)
    found, want = read(shelf(name, adapter)).values, oracle(home, home.folder / adapter)
    if (name, adapter) == ("llama-tied", "embed"):
        want["output.weight"] = read(home.base).values["token_embd.weight"]
    assert_tensors(found, want)
    if home.permutes:
        wrong = oracle(home, home.folder / adapter, permute=False)
        moved = [n for n in found if n.endswith(("attn_q.weight", "attn_k.weight")) and nmse(wrong[n], want[n]) > 1e-3]
        assert moved, "π does not matter here"


@pytest.mark.parametrize(("name", "adapter"), ADAPTERS)
def test_llama_cpp_computes_what_peft_computes(name: str, adapter: str, computed: Computed) -> None:
    home, found = family(name), computed(name, adapter)
    expected = home.expected(exact=False)
    assert nmse(found, expected[adapter]) < (ROUNDED_GELU if home.gelu else EXACT)
    assert nmse(expected["base"], expected[adapter]) > CONTROL
    if home.gelu:  # without rounding of the GELU, what llama.cpp computes is as far off as it is of the base itself
        exact = home.expected()
        assert nmse(found, exact[adapter]) < 10 * max(nmse(expected[n], exact[n]) for n in ("base", adapter))


@pytest.mark.parametrize(
    ("name", "adapter"),
    [case for case in ADAPTERS if case[0] not in ("granite", "smollm3", "mixtral")],
)
def test_transformers_computes_what_peft_computes(name: str, adapter: str, shelf: Shelf) -> None:
    """By its own loader of GGUF files; where it has none for the family, from the weights that are in the file."""
    import transformers

    home, path = family(name), shelf(name, adapter)
    config = transformers.AutoConfig.from_pretrained(home.folder)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    kind: Any = getattr(transformers, config.architectures[0])
    if name in ("gemma", "phi2"):
        weights = {n: torch.from_numpy(w) for n, w in home.back(read(path).values).items()}
        model = kind.from_pretrained(None, state_dict=weights, **options)
    else:
        config.tie_word_embeddings &= (name, adapter) not in TIED
        model = kind.from_pretrained(path.parent, gguf_file=path.name, **options)
    with torch.no_grad():
        found = model.eval()(torch.tensor(home.tokens)).logits[:, -1].numpy()
    assert nmse(found, home.expected()[adapter]) < EXACT


@pytest.mark.parametrize("name", ["llama", "granite", "smollm3", "mixtral"])
def test_the_wrong_row_order_would_be_seen(name: str, tmp_path: Path) -> None:
    """W + s·BA (and m) in the Hugging Face order, on the base in llama.cpp's: the mistake that π avoids."""
    home = family(name)
    hf, hand = home.weights, by_hand(home.folder / "dora")
    values = oracle(home, home.folder / "dora")
    for block in range(2):
        for leaf, gguf_leaf, heads in (("q", "attn_q", 4), ("k", "attn_k", 2)):
            module = f"model.layers.{block}.self_attn.{leaf}_proj"
            update = hand.modules[module]
            assert update.m is not None
            v = interleaved(hf[f"{module}.weight"], heads) + update.scaling * (update.b @ update.a)
            values[f"blk.{block}.{gguf_leaf}.weight"] = v * (update.m / np.linalg.norm(v, axis=1))[:, None]
    wrong = rewrite(home.base, tmp_path / "wrong.gguf", values)
    assert nmse(log_probabilities(wrong, home.tokens), home.expected()["dora"]) > 1e-3


@pytest.mark.parametrize(("name", "adapter"), ADAPTERS)
def test_the_template_route_gives_the_same_file(name: str, adapter: str, shelf: Shelf, tmp_path: Path) -> None:
    """The base's weights are exact in float32, so the full-precision route has nothing to gain here."""
    home, out = family(name), tmp_path / "out.gguf"
    untie = ["--untie"] if (name, adapter) in TIED else []
    run("merge", home.folder / adapter, "--base", home.folder, "--like", home.base, "-o", out, *untie)
    assert out.read_bytes() == shelf(name, adapter).read_bytes()
    assert sorted(tmp_path.iterdir()) == [out]


# --- 2: what does not change -----------------------------------------------------------------------------------------


def touched_by(home: Family, adapter: Path) -> set[str]:
    hand = by_hand(adapter)
    return {home.place(f"{m}.weight")[0] for m in hand.modules} | {home.place(n)[0] for n in hand.saved}


@pytest.mark.parametrize(("name", "adapter"), ADAPTERS)
def test_everything_else_is_the_base_byte_for_byte(name: str, adapter: str, shelf: Shelf) -> None:
    home = family(name)
    before, after = read(home.base), read(shelf(name, adapter))
    touched = touched_by(home, home.folder / adapter)
    assert after.kv == before.kv
    added = ["output.weight"] if (name, adapter) in TIED else []
    assert [n for n in after.tensors if n not in added] == list(before.tensors), "another order"
    assert all(after.tensors[n] == stored for n, stored in before.tensors.items() if n not in touched)
    assert {n for n in after.tensors if n not in before.tensors} == {*added}
    assert set(after.types.values()) <= gguf_models.RUNNABLE
    offset = min(after.offsets.values())
    for tensor, stored in after.tensors.items():  # contiguous, in order, aligned: what llama.cpp demands
        assert after.offsets[tensor] == offset
        offset += -(-len(stored.raw) // 32) * 32
    assert shelf(name, adapter).stat().st_size == offset


# --- 3: adapters as GGUF ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("exported")

    def export(name: str, adapter: str) -> Path:
        path, home = folder / f"{name}-{adapter}.gguf", family(name)
        if not path.exists():
            run("convert", home.folder / adapter, "--to", "gguf", "--like", home.base, "-o", path)
        return path

    return export


def products(path: Path) -> dict[str, Floats]:
    """What llama.cpp adds to each tensor, in float64, by its rule for the scale (reference §2.2)."""
    file = read(path)
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    found = {}
    for name, a in file.values.items():
        if not name.endswith(".lora_a"):
            continue
        target = name.removesuffix(".lora_a")
        b = file.values[f"{target}.lora_b"]
        scale = alpha / b.shape[-1] if alpha else 1.0
        found[target] = scale * (a @ b.T if target == "token_embd.weight" else b @ a)
    return found


def updates(home: Family, adapter: Path) -> dict[str, Floats]:
    """What the adapter adds to each tensor of the GGUF."""
    after, before = oracle(home, adapter), home.converted(home.weights)
    return {name: after[name] - before[name] for name in touched_by(home, adapter)}


@pytest.mark.parametrize(("name", "adapter"), EXPORTED)
def test_an_exported_adapter_is_peft_s(name: str, adapter: str, exported: Shelf, computed: Computed) -> None:
    home, path = family(name), exported(name, adapter)
    file, fields = read(path), read(path).fields
    assert fields["general.architecture"] == read(home.base).fields["general.architecture"]
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    names = list(file.tensors)
    assert [n.removesuffix(".lora_a") for n in names[::2]] == [n.removesuffix(".lora_b") for n in names[1::2]]
    assert {*file.types.values()} == {"F32"}
    want = updates(home, home.folder / adapter)
    found = products(path)
    assert found.keys() == want.keys()
    for target, product in want.items():  # rounding of W + ΔW to float64 aside, the products are the same
        gguf_models.assert_close(found[target], product, target)
    expected = home.expected(exact=False)
    at_run_time = log_probabilities(home.base, home.tokens, [(path, 1.0)])
    bar = ROUNDED_GELU if home.gelu else EXACT
    assert nmse(at_run_time, expected[adapter]) < bar
    assert nmse(at_run_time, computed(name, adapter)) < bar


@pytest.mark.parametrize(("name", "adapter"), EXPORTED)
def test_a_model_or_a_gguf_says_the_same(name: str, adapter: str, exported: Shelf, tmp_path: Path) -> None:
    home = family(name)
    run("convert", home.folder / adapter, "--to", "gguf", "--base", home.folder, "-o", tmp_path / "hf.gguf")
    run("convert", home.folder / adapter, "--to", "gguf", "--base", home.base, "-o", tmp_path / "gguf.gguf")
    assert (tmp_path / "hf.gguf").read_bytes() == exported(name, adapter).read_bytes()
    assert (tmp_path / "gguf.gguf").read_bytes() == exported(name, adapter).read_bytes()


@pytest.mark.parametrize(("name", "adapter"), [("llama", "rslora"), ("mixtral", "lora"), ("qwen3", "rslora")])
def test_half_of_an_adapter(name: str, adapter: str, exported: Shelf, tmp_path: Path) -> None:
    home = family(name)
    run("merge", home.folder / adapter, "--base", home.base, "--strength", "0.5", "-o", tmp_path / "half.gguf")
    assert_tensors(read(tmp_path / "half.gguf").values, oracle(home, home.folder / adapter, strength=0.5))
    merged = log_probabilities(tmp_path / "half.gguf", home.tokens)
    assert nmse(log_probabilities(home.base, home.tokens, [(exported(name, adapter), 0.5)]), merged) < EXACT
    assert nmse(home.expected()[adapter], merged) > CONTROL
    assert nmse(home.expected()["base"], merged) > CONTROL


def without(*endings: str) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    return lambda name, tensor: None if any(ending in name for ending in endings) else tensor


def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Half of the rank of the first expert's w1."""
    if "experts.0.w1.lora_A" in name or "experts.0.gate_proj.lora_A" in name:
        return tensor[:2]
    return tensor[:, :2] if "experts.0.w1.lora_B" in name or "experts.0.gate_proj.lora_B" in name else tensor


@pytest.mark.parametrize(
    ("name", "edit", "settings"),
    [
        ("mixtral", without("experts.1."), {}),
        ("mixtral", without("experts.0.", "experts.2.", "layers.1.block_sparse_moe", "self_attn"), {}),
        ("mixtral", cut, {"rank_pattern": {"experts.0.w1": 2}}),
        ("qwen3moe", without("experts.3.gate", "experts.0.up", "layers.0.mlp.experts.2.down"), {}),
        ("qwen3moe", cut, {"rank_pattern": {"experts.0.gate_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    ],
)
def test_some_experts_and_ranks_of_their_own(name: str, edit: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    home = family(name)
    adapter = gguf_models.edited_adapter(home.folder / "lora", tmp_path / "edited", edit, **settings)
    run("convert", adapter, "--to", "gguf", "--like", home.base, "-o", tmp_path / "lora.gguf")
    run("merge", adapter, "--base", home.base, "-o", tmp_path / "merged.gguf")
    run("merge", tmp_path / "lora.gguf", "--base", home.base, "-o", tmp_path / "again.gguf")
    want = updates(home, adapter)
    found = products(tmp_path / "lora.gguf")
    assert found.keys() == want.keys()
    for target, product in want.items():
        gguf_models.assert_close(found[target], product, target)
    merged = oracle(home, adapter)
    assert_tensors(read(tmp_path / "merged.gguf").values, merged)
    assert_tensors(read(tmp_path / "again.gguf").values, merged)
    whole = log_probabilities(tmp_path / "merged.gguf", home.tokens)
    assert nmse(log_probabilities(home.base, home.tokens, [(tmp_path / "lora.gguf", 1.0)]), whole) < EXACT
    assert nmse(home.expected()["base"], whole) > CONTROL
    run("convert", tmp_path / "lora.gguf", "--to", "peft", "--base", home.folder, "-o", tmp_path / "back")
    assert_same_updates(tmp_path / "back", adapter)


def assert_same_updates(found: Path, want: Path, absent_is_zero: bool = True) -> None:
    """The same s·BA of every module, in float64; modules that only the stack has are zero."""
    ours, theirs = by_hand(found), by_hand(want)
    assert theirs.modules.keys() <= ours.modules.keys()
    assert not ours.saved
    for module, update in ours.modules.items():
        product = update.scaling * (update.b @ update.a)
        if module not in theirs.modules:
            assert absent_is_zero and not product.any(), module
            continue
        other = theirs.modules[module]
        assert update.embedding == other.embedding
        gguf_models.assert_close(product, other.scaling * (other.b @ other.a), module)


@pytest.mark.parametrize(("dtype", "kinds", "bar"), [("float16", {"F16"}, 1e-6), ("bfloat16", {"F32"}, EXACT)])
@pytest.mark.parametrize(("name", "adapter"), [("llama", "lora"), ("gpt2", "lora"), ("qwen3moe", "lora")])
def test_halves_in_half_precision(
    name: str, adapter: str, dtype: str, kinds: set[str], bar: float, tmp_path: Path
) -> None:
    """F16 is kept; what was BF16 becomes F32, in which it is exact."""
    home = family(name)
    half = gguf_models.edited_adapter(
        home.folder / adapter, tmp_path / "half", lambda n, t: t.to(getattr(torch, dtype))
    )
    run("convert", half, "--to", "gguf", "--like", home.base, "-o", tmp_path / "lora.gguf")
    assert {*read(tmp_path / "lora.gguf").types.values()} == kinds
    for target, product in updates(home, half).items():
        gguf_models.assert_close(products(tmp_path / "lora.gguf")[target], product, target)
    run("merge", half, "--base", home.base, "-o", tmp_path / "merged.gguf")
    merged = log_probabilities(tmp_path / "merged.gguf", home.tokens)
    found = log_probabilities(home.base, home.tokens, [(tmp_path / "lora.gguf", 1.0)])
    assert nmse(found, merged) < (max(bar, ROUNDED_GELU) if home.gelu else bar)
    assert nmse(home.expected()["base"], merged) > CONTROL


def test_a_folded_scaling_is_not_rounded_to_half_precision(tmp_path: Path) -> None:
    home = family("llama")
    half = gguf_models.edited_adapter(home.folder / "rslora", tmp_path / "half", lambda n, t: t.half())
    run("convert", half, "--to", "gguf", "--like", home.base, "-o", tmp_path / "lora.gguf")
    found = products(tmp_path / "lora.gguf")
    for target, product in updates(home, half).items():
        gguf_models.assert_close(found[target], product, target)


def test_an_architecture_may_be_all_that_is_known(exported: Shelf, tmp_path: Path, refuse: Refuse) -> None:
    qwen, out = family("qwen3"), tmp_path / "lora.gguf"
    run("convert", qwen.folder / "rslora", "--to", "gguf", "--arch", "qwen3", "-o", out)
    assert out.read_bytes() == exported("qwen3", "rslora").read_bytes()
    llama = family("llama").folder / "lora"
    export = ("convert", llama, "--to", "gguf")
    refuse(INPUT, ["how many heads", "--base"], *export, "--arch", "llama", out=tmp_path / "a.gguf")
    refuse(TARGET, ["--like", "--base", "--arch"], *export, out=tmp_path / "b.gguf")
    refuse(INPUT, ["'mamba'", "convert_hf_to_gguf.py"], *export, "--arch", "mamba", out=tmp_path / "c.gguf")
    refuse(TARGET, ["qwen3", "'llama'"], *export, "--arch", "qwen3", "--like", family("llama").base, out=tmp_path / "d")
    experts = ("convert", family("qwen3moe").folder / "lora", "--to", "gguf", "--arch", "qwen3moe")
    refuse(TARGET, ["How many experts", "--like"], *experts, out=tmp_path / "e.gguf")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dora_is_refused_with_three_ways_out(name: str, tmp_path: Path, refuse: Refuse) -> None:
    home = family(name)
    words = ["magnitude", "--base MODEL.gguf", "--like", "to-lora"]
    command = ("convert", home.folder / "dora", "--to", "gguf", "--like", home.base)
    refuse(TARGET, words, *command, out=tmp_path / "x.gguf")


@pytest.mark.parametrize(("name", "adapter"), WHOLE)
def test_tensors_that_are_saved_whole_are_refused(name: str, adapter: str, tmp_path: Path, refuse: Refuse) -> None:
    home = family(name)
    command = ("convert", home.folder / adapter, "--to", "gguf", "--like", home.base)
    refuse(TARGET, ["whole trained tensors", "Merge"], *command, out=tmp_path / "x.gguf")


@pytest.mark.parametrize(("name", "adapter"), TIED)
def test_an_adapter_of_a_tied_embedding_is_refused(name: str, adapter: str, tmp_path: Path, refuse: Refuse) -> None:
    """llama.cpp would abort on it."""
    home, export = family(name), ("convert", GGUF_TIED / adapter, "--to", "gguf")
    for number, model in enumerate((("--like", home.base), ("--base", home.folder), ("--base", home.base))):
        refuse(TARGET, ["the embedding is the head"], *export, *model, out=tmp_path / f"{number}.gguf")
    refuse(TARGET, ["the embedding is the head"], *export, "--arch", "qwen3", out=tmp_path / "arch.gguf")


GGUF_TIED = gguf_models.GGUF / "llama-tied"

# --- 4: adapters read back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "adapter"), EXPORTED)
def test_an_adapter_comes_back(name: str, adapter: str, exported: Shelf, tmp_path: Path) -> None:
    home, path = family(name), exported(name, adapter)
    original = load_file(home.folder / adapter / "adapter_model.safetensors")
    for base in (home.folder, home.base):
        out = tmp_path / base.name
        run("convert", path, "--to", "peft", "--base", base, "-o", out)
        assert_same_updates(out, home.folder / adapter)
        found = load_file(out / "adapter_model.safetensors")
        assert {n for n in original if ".base_layer." not in n} == found.keys()
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == f"tiny/{name}"
        for key, tensor in found.items():
            if "rslora" not in adapter or "lora_A" in key:
                assert torch.equal(tensor, original[key]), key


def test_without_a_base_the_order_of_rows_must_not_matter(exported: Shelf, tmp_path: Path, refuse: Refuse) -> None:
    command = ("convert", exported("llama", "lora"), "--to", "peft")
    refuse(INPUT, ["--base", "how many heads"], *command, out=tmp_path / "llama")
    refuse(INPUT, ["llama", "qwen2"], *command, "--base", family("qwen2").base, out=tmp_path / "other")
    run("convert", exported("qwen2", "lora"), "--to", "peft", "-o", tmp_path / "qwen2")
    assert_same_updates(tmp_path / "qwen2", family("qwen2").folder / "lora")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("llama", "lora"), ("llama", "rslora"), ("llama", "embed"), ("gpt2", "rslora"), ("mixtral", "lora"),
     ("phi3", "lora"), ("qwen2", "lora")],
)  # fmt: skip
def test_an_adapter_in_gguf_merges_like_the_original(
    name: str, adapter: str, exported: Shelf, shelf: Shelf, tmp_path: Path
) -> None:
    home, path = family(name), exported(name, adapter)
    run("merge", path, "--base", home.base, "-o", tmp_path / "merged.gguf")
    want = oracle(home, home.folder / adapter)
    assert_tensors(read(tmp_path / "merged.gguf").values, want)
    assert read(tmp_path / "merged.gguf").kv == read(home.base).kv
    run("merge", path, "--base", home.folder, "-o", tmp_path / "hf", "--dtype", "float32")
    found = {n: t.double().numpy() for n, t in load_file(tmp_path / "hf" / "model.safetensors").items()}
    assert_tensors(home.converted(found), want)
    run("merge", path, "--base", home.folder, "--like", home.base, "-o", tmp_path / "like.gguf")
    assert (tmp_path / "like.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()


# --- 5: quantised bases ----------------------------------------------------------------------------------------------


def quantised(home: Family, kind: str, folder: Path) -> Path:
    return rewrite(home.base, folder / f"{kind}.gguf", types=gguf_models.matrices_as(kind))


def merged_from(home: Family, base: Path, adapter: Path) -> dict[str, Floats]:
    """The merge into the values of a GGUF file, in float64."""
    weights = home.back(read(base).values)
    return home.converted(merged_by_hand(weights, by_hand(adapter), home.architecture == "gpt2"))


def quantised_by_gguf(values: Floats, kind: str) -> bytes:
    return bytes(quants.quantize(values.astype(np.float32), GGMLQuantizationType[kind]).tobytes())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize(("name", "adapter"), [("llama", "partial"), ("llama", "dora"), ("qwen3moe", "dora")])
def test_what_is_merged_into_a_quantised_base_becomes_q8_0(kind: str, name: str, adapter: str, tmp_path: Path) -> None:
    home, out = family(name), tmp_path / "out.gguf"
    base = quantised(home, kind, tmp_path)
    run("merge", home.folder / adapter, "--base", base, "-o", out)
    before, after = read(base), read(out)
    touched, want = touched_by(home, home.folder / adapter), merged_from(home, base, home.folder / adapter)
    for name, stored in after.tensors.items():
        if name not in touched:
            assert stored == before.tensors[name]
            continue
        assert (stored.kind, stored.shape) == ("Q8_0", before.tensors[name].shape)
        # a step is 1/127 of the block's largest: half of one for rounding, and what F16 takes from the step itself
        assert_rounded(stored.values, want[name], (0.5 + 127 / 2**11 + 0.01) / 127)
    assert list(after.tensors) == list(before.tensors)
    fields = dict(before.fields)
    assert after.fields | {"general.file_type": 0} == fields | {"general.file_type": 0}
    assert len(after.kv) == len(before.kv)


def assert_rounded(found: Floats, want: Floats, bar: float) -> None:
    """Every value within ``bar`` of the largest of its block of 32."""
    blocks = [x.reshape(-1, 32) for x in (found, want)]
    largest = np.abs(blocks[1]).max(1, keepdims=True)
    assert float((np.abs(blocks[0] - blocks[1]) / largest).max()) <= bar


def narrowed(home: Family, folder: Path) -> tuple[Path, Path]:
    """The llama with 80 instead of 96 hidden units, which is no multiple of 32, and its LoRA."""
    values = read(home.base).values
    for name in values:
        if "ffn_gate" in name or "ffn_up" in name:
            values[name] = values[name][:80]
        if "ffn_down" in name:
            values[name] = values[name][:, :80]
    base = rewrite(home.base, folder / "narrow.gguf", values, values={"llama.feed_forward_length": 80})

    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "down_proj.lora_A" in name:
            return tensor[:, :80]
        return tensor[:80] if ("gate_proj.lora_B" in name or "up_proj.lora_B" in name) else tensor

    return base, gguf_models.edited_adapter(home.folder / "lora", folder / "narrow", edit)


def test_rows_that_no_block_divides_become_f16(tmp_path: Path) -> None:
    base, adapter = narrowed(family("llama"), tmp_path)
    run("merge", adapter, "--base", base, "-o", tmp_path / "f32.gguf")
    run("merge", adapter, "--base", base, "--gguf-type", "q8_0", "-o", tmp_path / "q8.gguf")
    types = read(tmp_path / "q8.gguf").types
    assert {n: k for n, k in types.items() if "ffn_down" in n} == {f"blk.{i}.ffn_down.weight": "F16" for i in range(2)}
    assert {k for n, k in types.items() if "norm" not in n and "ffn_down" not in n} == {"Q8_0"}
    exact = log_probabilities(tmp_path / "f32.gguf", family("llama").tokens)
    assert nmse(log_probabilities(tmp_path / "q8.gguf", family("llama").tokens), exact) < 1e-2
    assert nmse(log_probabilities(base, family("llama").tokens), exact) > 0.5


def faint(home: Family, adapter: str, factor: float, folder: Path) -> Path:
    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * factor if "lora_B" in name else tensor

    return gguf_models.edited_adapter(home.folder / adapter, folder / "faint", edit)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_keeping_the_type_would_erase_a_small_adapter(kind: str, tmp_path: Path, refuse: Refuse) -> None:
    home = family("llama")
    base, adapter = quantised(home, kind, tmp_path), faint(home, "lora", 0.003, tmp_path)
    command = ("merge", adapter, "--base", base, "--gguf-type", "keep")
    said = refuse(TARGET, ["--gguf-type keep", "--like", "--allow-loss"], *command, out=tmp_path / "out" / "x.gguf")
    assert "Nothing was written" in said
    run(*command, "--allow-loss", "-o", tmp_path / "kept.gguf")
    assert read(tmp_path / "kept.gguf").types == read(base).types
    assert read(tmp_path / "kept.gguf").kv == read(base).kv
    run("merge", adapter, "--base", base, "-o", tmp_path / "auto.gguf")


@pytest.mark.parametrize(("kind", "choice"), [("Q4_0", "keep"), ("Q4_1", "auto"), ("F32", "q4_0"), ("F32", "bf16")])
@pytest.mark.parametrize("factor", [1.0, 0.02])
def test_gain_and_error_are_what_numpy_finds(kind: str, choice: str, factor: float, tmp_path: Path) -> None:
    home = family("llama")
    base, adapter = quantised(home, kind, tmp_path), faint(home, "lora", factor, tmp_path)
    plan = api.merge(adapter, base, tmp_path / "out.gguf", gguf_type=choice, allow_loss=True)
    assert plan.storing is not None
    report = plan.storing.report()
    before, after, want = read(base), read(tmp_path / "out.gguf"), merged_from(home, base, adapter)
    assert report["type"] == choice
    assert touched_by(home, adapter) <= report["tensors"].keys()
    for name, said in report["tensors"].items():
        w, stored, merged = before.tensors[name].values, after.tensors[name].values, want[name]
        assert (said["from"], said["to"]) == (before.types[name], after.types[name])
        assert said["relative_error"] == pytest.approx(np.linalg.norm(stored - merged) / np.linalg.norm(merged), 1e-3)
        delta = merged - w
        if not np.abs(delta).max() > 1e-12:
            assert said["gain"] is said["error"] is None
            continue
        assert said["gain"] == pytest.approx(((stored - w) * delta).sum() / (delta**2).sum(), abs=1e-3)
        assert said["error"] == pytest.approx(np.linalg.norm(stored - merged) / np.linalg.norm(delta), 1e-3)


TYPES = {
    "f32": ("F32", 0, 1e-9), "f16": ("F16", 1, 1e-5), "bf16": ("BF16", 32, 1e-3), "q8_0": ("Q8_0", 7, 5e-3),
    "q4_0": ("Q4_0", 2, 0.4), "q4_1": ("Q4_1", 3, 0.4), "q5_1": ("Q5_1", 9, 0.2), "q4_k_m": ("Q5_0", 15, 0.3),
}  # fmt: skip  # q4_k_m: rows of 64 and 96 are no multiple of 256


@pytest.mark.parametrize("choice", TYPES)
def test_all_matrices_in_a_type(choice: str, shelf: Shelf, tmp_path: Path) -> None:
    """What is stored is the float32 merge, rounded by gguf itself."""
    home, (kind, number, bar) = family("llama"), TYPES[choice]
    command = ("merge", home.folder / "dora", "--gguf-type", choice)
    run(*command, "--base", home.base, "-o", tmp_path / "out.gguf")
    run(*command, "--base", home.folder, "--like", home.base, "-o", tmp_path / "like.gguf")
    assert (tmp_path / "like.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()
    found, merged = read(tmp_path / "out.gguf"), read(shelf("llama", "dora"))
    for name, stored in found.tensors.items():
        assert stored.raw == quantised_by_gguf(merged.tensors[name].values, stored.kind), name
    matrices = [k for n, k in found.types.items() if len(found.tensors[n].shape) > 1 and n.startswith("blk")]
    assert max(set(matrices), key=matrices.count) == kind
    assert {*found.types.values()} <= gguf_models.RUNNABLE
    assert found.fields == merged.fields | {"general.file_type": number}
    assert nmse(log_probabilities(tmp_path / "out.gguf", home.tokens), home.expected()["dora"]) < bar
    assert nmse(home.expected()["base"], home.expected()["dora"]) > 2 * bar


# --- 5b: a real model ------------------------------------------------------------------------------------------------


PROMPTS = [[504, 3575, 282, 4649, 314], [3473, 33937, 339, 30324, 260, 827, 3822, 284]]
REAL = ["smollm2-dora", "smollm2-lora", "smollm2-rslora"]


@pytest.fixture(scope="module")
def peft_logits(real_model: Callable[[str], Path]) -> dict[str, NDArray[Any]]:
    """PEFT's, in float32, on the dequantised model: of the base and of each adapter, unmerged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real_model("smollm2-f32"), dtype=torch.float32).eval()

    def logits(model: Any) -> NDArray[Any]:
        with torch.no_grad():
            return np.stack([model(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])

    found = {"base": logits(base)}
    for name in REAL:
        model = PeftModel.from_pretrained(base, FIXTURES / name)
        found[name] = logits(model.eval())
        base = model.unload()
    return found


@pytest.mark.parametrize("adapter", REAL)
def test_a_real_model_in_q4_1(
    adapter: str, real_model: Callable[[str], Path], peft_logits: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    base, want = real_model("smollm2-gguf"), peft_logits[adapter]
    control = nmse(peft_logits["base"], want)
    run("merge", FIXTURES / adapter, "--base", base, "--gguf-type", "f32", "-o", tmp_path / "f32.gguf")
    assert nmse(log_probabilities(tmp_path / "f32.gguf", PROMPTS), want) < 1e-6
    plan = api.merge(FIXTURES / adapter, base, tmp_path / "auto.gguf")
    found = nmse(log_probabilities(tmp_path / "auto.gguf", PROMPTS), want)
    assert found < 1e-2
    assert found < control / 50
    assert control > CONTROL
    assert plan.storing is not None
    report = plan.storing.report()
    assert all(0.98 < t["gain"] < 1.02 for t in report["tensors"].values())
    assert {(t["from"], t["to"]) for t in report["tensors"].values()} == {("Q4_1", "Q8_0")}
    assert not [note for note in plan.notes if "right base" in note]
    if "dora" in adapter and "rslora" not in adapter:
        assert min(report["magnitude_correlation"].values()) > 0.9
    (tmp_path / "f32.gguf").unlink()


# --- 6: ties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "adapter"), TIED)
def test_one_end_of_a_tie_needs_untie(name: str, adapter: str, shelf: Shelf, tmp_path: Path, refuse: Refuse) -> None:
    home = family(name)
    words = ["token_embd.weight", "output.weight", "--untie"]
    command = ("merge", home.folder / adapter, "--base")
    refuse(TARGET, words, *command, home.base, out=tmp_path / "a" / "out.gguf")
    refuse(TARGET, words, *command, home.folder, "--like", home.base, out=tmp_path / "out.gguf")
    before, after = read(home.base).values, read(shelf(name, adapter)).values
    kept, trained = ("output.weight", "token_embd.weight")[:: 1 if adapter == "embed" else -1]
    assert np.array_equal(after[kept], before["token_embd.weight"])
    assert nmse(after[trained], before["token_embd.weight"]) > 1e-3
    assert list(after)[:-1] == list(before)


@pytest.mark.parametrize(
    "adapter",
    [
        "embed",
        "head",
    ],
)
def test_an_untied_end_of_a_quantised_base(adapter: str, tmp_path: Path) -> None:
    """The end that was trained gets room; the other stays as it was."""
    home, out = family("llama-tied"), tmp_path / "out.gguf"
    base = quantised(home, "Q4_0", tmp_path)
    run("merge", home.folder / adapter, "--base", base, "-o", out, "--untie")
    found, before = read(out), read(base)
    trained, kept = ("token_embd.weight", "output.weight")[:: 1 if adapter == "embed" else -1]
    assert found.types[trained] == "Q8_0"
    assert_rounded(found.values[trained], merged_from(home, base, home.folder / adapter)[trained], 0.58 / 127)
    assert found.tensors[kept] == before.tensors["token_embd.weight"]


def embedding_adapter(home: Family, folder: Path, ends: tuple[str, ...] = ("embed_tokens",)) -> Path:
    """A LoRA of the embedding, or of the head, by hand."""
    rows, width, random = home.config["vocab_size"], home.config["hidden_size"], torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    if "embed_tokens" in ends:
        key = "base_model.model.model.embed_tokens.lora_embedding_"
        tensors |= {key + "A": torch.randn(2, rows, generator=random) / 4}
        tensors |= {key + "B": torch.randn(width, 2, generator=random) / 4}
    if "lm_head" in ends:
        key = "base_model.model.lm_head.lora_"
        tensors |= {key + "A.weight": torch.randn(2, width, generator=random) / 4}
        tensors |= {key + "B.weight": torch.randn(rows, 2, generator=random) / 4}
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(ends), "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_gemma_cannot_be_untied(end: str, tmp_path: Path, refuse: Refuse) -> None:
    home = family("gemma")
    adapter = embedding_adapter(home, tmp_path / "adapter", (end,))
    for extra in ((), ("--untie",), ("--like", home.base), ("--like", home.base, "--untie")):
        base = home.folder if "--like" in extra else home.base
        words = ["token_embd.weight", "output.weight", "gemma", "whatever the file holds"]
        refuse(TARGET, words, "merge", adapter, "--base", base, *extra, out=tmp_path / "out.gguf")


def test_both_ends_of_a_tie(tmp_path: Path) -> None:
    home = family("llama-tied")
    adapter = embedding_adapter(home, tmp_path / "adapter", ("embed_tokens", "lm_head"))
    run("merge", adapter, "--base", home.base, "-o", tmp_path / "out.gguf", "--untie")
    assert_tensors(read(tmp_path / "out.gguf").values, oracle(home, adapter))


# --- 7: fused bases --------------------------------------------------------------------------------------------------


def fused(values: Mapping[str, Floats]) -> dict[str, Floats]:
    """As a converter with --fuse-qkv and fused experts would write them: rows q | k | v; of each expert gate | up."""
    result: dict[str, Floats] = {}
    for name, array in values.items():
        block = name.rpartition(".weight")[0].rpartition(".")[0]
        if name.endswith("attn_q.weight"):
            parts = [values[f"{block}.attn_{leaf}.weight"] for leaf in "qkv"]
            result[f"{block}.attn_qkv.weight"] = np.concatenate(parts)
        elif name.endswith("ffn_gate_exps.weight"):
            pair = [values[f"{block}.ffn_{leaf}_exps.weight"] for leaf in ("gate", "up")]
            result[f"{block}.ffn_gate_up_exps.weight"] = np.concatenate(pair, axis=1)
        elif not name.endswith(("attn_k.weight", "attn_v.weight", "ffn_up_exps.weight")):
            result[name] = array
    return result


FUSED = [("llama", "lora"), ("llama", "dora"), ("llama", "rslora"), ("llama", "partial"), ("qwen3moe", "lora"),
         ("qwen3moe", "dora"), ("mixtral", "lora"), ("mixtral", "dora"), ("mixtral", "router")]  # fmt: skip


@pytest.mark.parametrize(("name", "adapter"), FUSED)
def test_a_fused_base(name: str, adapter: str, shelf: Shelf, tmp_path: Path) -> None:
    home = family(name)
    base = rewrite(home.base, tmp_path / "base.gguf", fused(read(home.base).values))
    run("merge", home.folder / adapter, "--base", base, "-o", tmp_path / "out.gguf")
    found = read(tmp_path / "out.gguf")
    assert any("attn_qkv" in n for n in found.tensors)
    assert_tensors(found.values, fused(oracle(home, home.folder / adapter)))
    assert_tensors(found.values, fused(read(shelf(name, adapter)).values), 1e-7)
    before = read(base)
    assert (found.kv, list(found.tensors)) == (before.kv, list(before.tensors))
    run("merge", home.folder / adapter, "--base", home.folder, "--like", base, "-o", tmp_path / "like.gguf")
    assert (tmp_path / "like.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize(("name", "adapter"), [case for case in FUSED if case[1] != "dora"])
def test_an_adapter_for_a_fused_base(name: str, adapter: str, tmp_path: Path) -> None:
    home, lora = family(name), tmp_path / "lora.gguf"
    base = rewrite(home.base, tmp_path / "base.gguf", fused(read(home.base).values))
    run("convert", home.folder / adapter, "--to", "gguf", "--like", base, "-o", lora)
    after, before = fused(oracle(home, home.folder / adapter)), fused(home.converted(home.weights))
    found = products(lora)
    changed = {n for n in after if not np.array_equal(after[n], before[n])}
    assert found.keys() == changed
    for target in changed:
        gguf_models.assert_close(found[target], after[target] - before[target], target)


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_llama_cpp_runs_fused_attention(name: str, tmp_path: Path) -> None:
    """Of fused experts it knows those of other architectures only."""
    home, expected, values = family(name), family(name).expected(), read(family(name).base).values
    some = {n: v for n, v in fused(values).items() if "gate_up" not in n}
    some |= {n: v for n, v in values.items() if n.endswith("_exps.weight")}
    base = rewrite(home.base, tmp_path / "base.gguf", some)
    assert nmse(log_probabilities(base, home.tokens), expected["base"]) < EXACT
    run("merge", home.folder / "dora", "--base", base, "-o", tmp_path / "out.gguf")
    assert nmse(log_probabilities(tmp_path / "out.gguf", home.tokens), expected["dora"]) < EXACT
    run("convert", home.folder / "lora", "--to", "gguf", "--like", base, "-o", tmp_path / "lora.gguf")
    found = log_probabilities(base, home.tokens, [(tmp_path / "lora.gguf", 1.0)])
    assert nmse(found, expected["lora"]) < EXACT
    assert min(nmse(expected["base"], expected[adapter]) for adapter in ("dora", "lora")) > CONTROL


# --- 8: refusals -----------------------------------------------------------------------------------------------------


def test_adapters_that_do_not_fit(tmp_path: Path, refuse: Refuse) -> None:
    llama, out = family("llama"), tmp_path / "out.gguf"
    odd = gguf_models.edited_adapter(llama.folder / "lora", tmp_path / "odd", lambda n, t: t)
    tensors = load_file(odd / "adapter_model.safetensors")
    tensors = {n.replace("layers.1.mlp.up_proj", "layers.1.mlp.extra_proj"): t for n, t in tensors.items()}
    save_file(tensors, odd / "adapter_model.safetensors")
    refuse(FIT, ["layers.1.mlp.extra_proj", "'llama'"], "merge", odd, "--base", llama.base, out=out)
    tensors = {n.replace("layers.1.mlp.extra_proj", "layers.7.mlp.up_proj"): t for n, t in tensors.items()}
    save_file(tensors, odd / "adapter_model.safetensors")
    refuse(FIT, ["blk.7.ffn_up"], "merge", odd, "--base", llama.base, out=out)
    qwen = family("qwen3").folder / "lora"
    refuse(FIT, ["'gpt2'", "right base"], "merge", qwen, "--base", family("gpt2").base, out=out)
    refuse(FIT, ["'gpt2'"], "convert", qwen, "--to", "gguf", "--like", family("gpt2").base, out=out)
    refuse(FIT, ["right base"], "merge", qwen, "--base", family("smollm3").base, out=out)
    refuse(FIT, ["right base"], "merge", family("qwen2").folder / "lora", "--base", llama.base, out=out)


def test_bases_whose_layout_is_not_known(tmp_path: Path, refuse: Refuse) -> None:
    home, out = family("llama"), tmp_path / "out" / "out.gguf"
    mamba = rewrite(home.base, tmp_path / "mamba.gguf", values={"general.architecture": "mamba"})
    words = ["'mamba'", "Known:", "convert_hf_to_gguf.py"]
    refuse(INPUT, words, "merge", home.folder / "lora", "--base", mamba, out=out)
    refuse(INPUT, words, "convert", home.folder / "lora", "--to", "gguf", "--like", mamba, out=out)
    refuse(INPUT, words, "merge", home.folder / "lora", "--base", home.folder, "--like", mamba, out=out)
    values = read(home.base).values
    scaled = rewrite(home.base, tmp_path / "nvfp4.gguf", values | {"blk.0.attn_q.scale": np.ones(1)})
    words = ["blk.0.attn_q", "scale", "NVFP4"]
    refuse(INPUT, words, "merge", home.folder / "lora", "--base", scaled, out=out)
    refuse(INPUT, words, "merge", home.folder / "lora", "--base", home.folder, "--like", scaled, out=out)
    elsewhere = rewrite(home.base, tmp_path / "ok.gguf", values | {"blk.0.attn_k.scale": np.ones(1)})
    run("merge", home.folder / "partial", "--base", elsewhere, "-o", tmp_path / "fine.gguf")  # k is no target of it


def test_head_counts_of_each_layer(tmp_path: Path, refuse: Refuse) -> None:
    """Deci's models have arrays; ours are equal numbers, so the result must be the same."""
    home = family("llama")
    arrays = {"llama.attention.head_count": [4, 4], "llama.attention.head_count_kv": [2, 2]}
    base = rewrite(home.base, tmp_path / "base.gguf", values=arrays)
    run("merge", home.folder / "dora", "--base", base, "-o", tmp_path / "out.gguf")
    assert_tensors(read(tmp_path / "out.gguf").values, oracle(home, home.folder / "dora"))
    # other heads in the second layer: the order of its rows is that of so many
    odd = rewrite(home.base, tmp_path / "odd.gguf", values=arrays | {"llama.attention.head_count": [4, 2]})
    run("merge", home.folder / "lora", "--base", odd, "-o", tmp_path / "other.gguf")
    update = by_hand(home.folder / "lora").modules["model.layers.1.self_attn.q_proj"]
    before, after = (read(p).values["blk.1.attn_q.weight"] for p in (odd, tmp_path / "other.gguf"))
    gguf_models.assert_close(after, before + update.scaling * interleaved(update.b @ update.a, 2), "blk.1.attn_q")
    short = rewrite(home.base, tmp_path / "short.gguf", values=arrays | {"llama.attention.head_count": [4, 3]})
    refuse(FIT, ["3 heads", "right base"], "merge", home.folder / "lora", "--base", short, out=tmp_path / "x.gguf")


def shuffled(values: Mapping[str, Floats], seed: int = 3) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    return {n: random.permutation(v) if v.ndim > 1 and n.startswith("blk") else v for n, v in values.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_wrong_base_is_told_by_the_magnitudes(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home = family(name)
    wrong = rewrite(home.base, tmp_path / "wrong.gguf", shuffled(read(home.base).values))
    run("merge", home.folder / "dora", "--base", home.base, "-o", tmp_path / "right.gguf")
    assert "right base" not in capfd.readouterr().err
    run("merge", home.folder / "dora", "--base", wrong, "-o", tmp_path / "out.gguf")
    assert "Is this the right base?" in capfd.readouterr().err
    run("merge", home.folder / "dora", "--base", wrong, "-o", tmp_path / "dry.gguf", "--dry-run", "--json")
    said = capfd.readouterr()
    report = json.loads(said.out)
    assert any("Is this the right base?" in note for note in report["notes"])
    assert max(report["gguf"]["magnitude_correlation"].values()) < 0.7
    plan = api.plan_merge(home.folder / "dora", wrong, tmp_path / "plan.gguf")
    plan.examine()
    assert any("Is this the right base?" in note for note in plan.said)


def test_rows_in_the_hugging_face_order_are_refused(tmp_path: Path, refuse: Refuse) -> None:
    """Of a DoRA whose magnitudes are the row norms, as they are when training begins."""
    home = family("llama")
    wrong = rewrite(home.base, tmp_path / "wrong.gguf", home.converted(home.weights, permute=False))

    def norms(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.endswith("magnitude_vector"):
            return tensor
        weight = home.weights[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
        return torch.from_numpy(np.linalg.norm(weight, axis=1)).float()

    adapter = gguf_models.edited_adapter(home.folder / "dora", tmp_path / "adapter", norms)
    words = ["Hugging Face order", "convert the base again"]
    refuse(FIT, words, "merge", adapter, "--base", wrong, out=tmp_path / "out.gguf")
    refuse(FIT, words, "merge", adapter, "--base", wrong, "--dry-run", out=tmp_path / "out.gguf")
    run("merge", adapter, "--base", home.base, "-o", tmp_path / "fine.gguf")


def test_templates_of_other_models(tmp_path: Path, refuse: Refuse) -> None:
    home, out = family("llama"), tmp_path / "out.gguf"
    values = read(home.base).values
    merge = ("merge", home.folder / "lora", "--base", home.folder, "--like")
    same = "GGUF of the same model"
    other = rewrite(home.base, tmp_path / "other.gguf", shuffled(values))
    said = refuse(FIT, ["cosine", same], *merge, other, out=out)
    assert "blk." in said
    refuse(FIT, ["cosine", same], *merge, other, "--dry-run", out=out)
    unordered = rewrite(home.base, tmp_path / "order.gguf", home.converted(home.weights, permute=False))
    refuse(FIT, ["order of the Hugging Face model"], *merge, unordered, out=out)
    refuse(FIT, [same], *merge, family("llama-tied").base, out=out)
    refuse(FIT, [same], *merge, family("qwen2").base, out=out)
    refuse(FIT, [], *merge, family("gpt2").base, out=out)
    lacking = rewrite(home.base, tmp_path / "lacking.gguf", {n: v for n, v in values.items() if "1.ffn_up" not in n})
    refuse(FIT, ["model.layers.1.mlp.up_proj.weight", same], *merge, lacking, out=out)
    extra = values | {"blk.1.attn_extra.weight": values["blk.1.attn_v.weight"]}
    more = rewrite(home.base, tmp_path / "more.gguf", extra, types=gguf_models.matrices_as("Q8_0"))
    refuse(FIT, ["blk.1.attn_extra.weight", same], *merge, more, out=out)
    folder = tmp_path / "hf"
    shutil.copytree(home.folder, folder, ignore=shutil.ignore_patterns("*.gguf", "lora", "dora"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj2.weight"] = weights["model.layers.0.mlp.gate_proj.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    command = ("merge", home.folder / "lora", "--base", folder, "--like", home.base)
    refuse(FIT, ["gate_proj2", same], *command, out=out)
    del weights["model.layers.0.mlp.gate_proj2.weight"], weights["model.layers.0.mlp.gate_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    q8 = quantised(home, "Q8_0", tmp_path)
    refuse(FIT, ["blk.0.ffn_gate.weight", same], *command[:-1], q8, out=out)
    refuse(USAGE, ["--like"], "merge", home.folder / "lora", "--base", home.base, "--like", home.base, out=out)
    refuse(USAGE, ["--like"], "merge", home.folder / "lora", "--base", home.folder, "--like", home.folder, out=out)


def test_a_template_of_another_seed(tmp_path: Path, refuse: Refuse) -> None:
    """A float32 template's matrices are kept as they are, so they too must be those of the base."""
    home, out = family("llama"), tmp_path / "out.gguf"
    random = np.random.default_rng(0)
    values = {n: 0.3 * random.normal(size=v.shape) if v.ndim > 1 else v for n, v in read(home.base).values.items()}
    for kind in ("F32", "Q4_0"):
        other = rewrite(home.base, tmp_path / f"{kind}.gguf", values, types=gguf_models.matrices_as(kind))
        command = ("merge", home.folder / "partial", "--base", home.folder, "--like", other)
        refuse(FIT, ["cosine", "GGUF of the same model"], *command, out=out)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_quantised_template_gives_full_precision(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    """Of the HF model's own type (BF16), or of the one that is asked for; vectors and metadata are the template's."""
    home = family("llama")
    like = quantised(home, kind, tmp_path)
    command = ("merge", home.folder / "dora", "--base", home.folder, "--like", like)
    run(*command, "-o", tmp_path / "f32.gguf", "--gguf-type", "f32")
    found, want = read(tmp_path / "f32.gguf"), read(shelf("llama", "dora"))
    assert found.values.keys() == want.values.keys()
    assert all(found.tensors[n] == stored for n, stored in want.tensors.items())
    run(*command, "-o", tmp_path / "auto.gguf")
    auto = read(tmp_path / "auto.gguf")
    assert {k for n, k in auto.types.items() if auto.tensors[n].shape[1:]} == {"BF16"}
    for name, stored in auto.tensors.items():
        gguf_models.assert_close(stored.values, want.tensors[name].values, name, 2**-8 * 1.01)
    assert auto.fields["general.file_type"] == 32
    run(*command, "-o", tmp_path / "q8.gguf", "--gguf-type", "q8_0")
    for name, stored in read(tmp_path / "q8.gguf").tensors.items():
        assert stored.raw == quantised_by_gguf(want.tensors[name].values, stored.kind), name


def test_a_template_with_fewer_tokens(tmp_path: Path, refuse: Refuse, capfd: pytest.CaptureFixture[str]) -> None:
    """As gemma3's converter writes it: the leading rows are taken, and that is said."""
    home, values = family("llama"), read(family("llama").base).values
    cut = {n: v[:200] if n in ("token_embd.weight", "output.weight") else v for n, v in values.items()}
    like = rewrite(home.base, tmp_path / "like.gguf", cut, types=gguf_models.matrices_as("Q8_0"))
    command = ("merge", home.folder / "lora", "--base", home.folder, "--like")
    run(*command, like, "-o", tmp_path / "out.gguf", "--gguf-type", "f32")
    assert "200 of the base's 208 rows" in capfd.readouterr().err
    want = oracle(home, home.folder / "lora")
    found = read(tmp_path / "out.gguf").values
    assert_tensors(found, {n: v[:200] if n in ("token_embd.weight", "output.weight") else v for n, v in want.items()})
    longer = {n: np.concatenate([v, v[:8]]) if n == "token_embd.weight" else v for n, v in values.items()}
    more = rewrite(home.base, tmp_path / "more.gguf", longer, types=gguf_models.matrices_as("Q8_0"))
    refuse(FIT, ["token_embd.weight", "216"], *command, more, out=tmp_path / "x.gguf")


def test_options_that_contradict(tmp_path: Path, refuse: Refuse) -> None:
    home, out = family("llama"), tmp_path / "out.gguf"
    merge = ("merge", home.folder / "lora", "--base")
    refuse(USAGE, ["--dtype", "--gguf-type"], *merge, home.base, "--dtype", "float16", out=out)
    like = (home.folder, "--like", home.base)
    refuse(USAGE, ["--dtype", "--gguf-type"], *merge, *like, "--dtype", "float16", out=out)
    for extra in (["--gguf-type", "q8_0"], ["--untie"], ["--modelfile"], ["--allow-loss"]):
        refuse(USAGE, ["--gguf-type", "GGUF base"], *merge, home.folder, *extra, out=tmp_path / "hf")
    refuse(USAGE, ["'q9_9'", "q4_k_m"], *merge, home.base, "--gguf-type", "q9_9", out=out)
    refuse(TARGET, ["importance matrix"], *merge, home.base, "--gguf-type", "iq2_xxs", out=out)
    refuse(USAGE, ["out.safetensors", ".gguf"], *merge, home.base, out=tmp_path / "out.safetensors")
    refuse(USAGE, ["out.gguf", "GGUF base"], *merge, home.folder, out=out)
    refuse(USAGE, ["--like", ".gguf"], *merge, *like, out=tmp_path / "folder")
    refuse(USAGE, ["--max-shard-size"], *merge, home.base, "--max-shard-size", "1MB", out=out)
    refuse(USAGE, ["--to gguf"], "convert", home.folder / "lora", "--to", "peft", "--arch", "llama", out=tmp_path / "p")
    refuse(INPUT, [], *merge, tmp_path / "absent.gguf", out=out)


def test_what_is_there_stays(tmp_path: Path, refuse: Refuse) -> None:
    home, there = family("llama"), tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    merge = ("merge", home.folder / "lora", "--base", home.base)
    refuse(USAGE, ["there.gguf", "--force"], *merge, out=there)
    assert there.read_bytes() == b"mine"
    run(*merge, "-o", there, "--force")
    assert_tensors(read(there).values, oracle(home, home.folder / "lora"))
    export = ("convert", home.folder / "lora", "--to", "gguf", "--like", home.base)
    there.write_bytes(b"mine")
    refuse(USAGE, ["there.gguf"], *export, out=there)
    assert there.read_bytes() == b"mine"
    base = tmp_path / "base.gguf"
    shutil.copy(home.base, base)
    for force in ([], ["--force"]):
        refuse(USAGE, ["base.gguf"], "merge", home.folder / "lora", "--base", base, *force, out=base)
        like = ("--base", home.folder, "--like", base)
        refuse(USAGE, ["base.gguf"], "merge", home.folder / "lora", *like, *force, out=base)
    assert base.read_bytes() == home.base.read_bytes()


def test_a_model_is_no_adapter_and_an_adapter_no_base(exported: Shelf, tmp_path: Path, refuse: Refuse) -> None:
    home, out = family("llama"), tmp_path / "out.gguf"
    refuse(INPUT, ["--base"], "merge", home.base, "--base", home.folder, out=out)
    refuse(INPUT, [], "merge", home.folder / "lora", "--base", exported("llama", "lora"), out=out)
    dora = rewrite(exported("llama", "lora"), tmp_path / "lone.gguf", dict(list(
        read(exported("llama", "lora")).values.items())[:-1]))  # fmt: skip
    refuse(INPUT, ["lora_a"], "merge", dora, "--base", home.base, out=out)


# --- 9: what goes with it --------------------------------------------------------------------------------------------


def test_a_modelfile(tmp_path: Path, refuse: Refuse) -> None:
    home = family("llama")
    command = ("merge", home.folder / "dora", "--base", home.base, "--modelfile")
    run(*command, "-o", tmp_path / "merged.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "merged.gguf"]
    assert (tmp_path / "Modelfile").read_text() == "FROM ./merged.gguf\n"
    refuse(USAGE, ["Modelfile"], *command, out=tmp_path / "other.gguf")


def test_a_directory_as_output(tmp_path: Path) -> None:
    home, out = family("llama"), tmp_path / "out"
    run("merge", home.folder / "dora", "--base", home.base, "-o", out, "--modelfile")
    names = sorted(p.name for p in out.iterdir())
    assert names == ["Modelfile", "README.md", "base.gguf", "dora_tools.json"]
    assert (out / "Modelfile").read_text() == "FROM ./base.gguf\n"
    assert_tensors(read(out / "base.gguf").values, oracle(home, home.folder / "dora"))
    manifest = json.loads((out / "dora_tools.json").read_text())
    assert manifest["gguf"]["type"] == "auto"
    assert manifest["gguf"]["tensors"].keys() == touched_by(home, home.folder / "dora")


def test_a_dry_run_and_its_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home, base = family("llama"), quantised(family("llama"), "Q4_0", tmp_path)
    options = ("--json", "--modelfile", "-o", tmp_path / "out" / "x.gguf")
    command = ("merge", home.folder / "dora", "--base", base, *options)
    there = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    run(*command, "--dry-run")
    dry = json.loads(capfd.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == there
    run(*command)
    report = json.loads(capfd.readouterr().out)
    touched = touched_by(home, home.folder / "dora")
    for said in (dry, report):
        assert said["schema"] == "dora-tools/merge/1"
        assert said["files"] == ["x.gguf", "Modelfile"]
        assert said["tensors"]["merged"]["count"] == len(touched)
        assert said["gguf"]["type"] == "auto"
        assert len(said["gguf"]["magnitude_correlation"]) == 10  # k and v have fewer rows than are needed
    assert (dry["dry_run"], report["dry_run"]) == (True, False)
    assert dry["gguf"]["tensors"] == {}
    assert report["gguf"]["tensors"].keys() == touched
    for tensor in report["gguf"]["tensors"].values():
        assert tensor.keys() == {"from", "to", "gain", "error", "relative_error"}
        assert (tensor["from"], tensor["to"]) == ("Q4_0", "Q8_0")
    sizes = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert report["bytes"] == dry["bytes"] == sizes


def test_several_adapters_with_strengths(tmp_path: Path) -> None:
    home = family("llama")
    names, strengths = ("lora", "partial", "dora"), (0.7, -0.3, 0.4)
    adapters = [home.folder / name for name in names]
    weights = [argument for s in strengths for argument in ("--strength", str(s))]
    run("merge", *adapters, "--base", home.base, *weights, "-o", tmp_path / "out.gguf")
    run("merge", *adapters, "--base", home.folder, "--like", home.base, *weights, "-o", tmp_path / "like.gguf")
    before = home.converted(home.weights)
    want = {n: v.copy() for n, v in before.items()}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for name, merged in oracle(home, adapter).items():
            want[name] += strength * (merged - before[name])
    assert_tensors(read(tmp_path / "out.gguf").values, want)
    assert (tmp_path / "like.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


@pytest.mark.parametrize("option", ["--like", "--base"])
def test_an_unchanged_embedding_beside_its_lora_is_no_obstacle(option: str, tmp_path: Path) -> None:
    """PEFT saves the embedding's own weight whenever it is among the targets."""
    home = family("llama")
    both = gguf_models.edited_adapter(home.folder / "embed", tmp_path / "both", lambda n, t: t)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (both, home.folder / "partial")]
    save_file(tensors[0] | tensors[1], both / "adapter_model.safetensors")
    run("convert", both, "--to", "gguf", option, home.base, "-o", tmp_path / "lora.gguf")
    for target, product in updates(home, both).items():
        gguf_models.assert_close(products(tmp_path / "lora.gguf")[target], product, target)


def test_a_changed_embedding_beside_its_lora_counts(tmp_path: Path) -> None:
    """PEFT loads the weight that it saved beside the factors."""
    home = family("llama")

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.25 if "base_layer" in name else tensor

    adapter = gguf_models.edited_adapter(home.folder / "embed", tmp_path / "adapter", moved)
    run("merge", adapter, "--base", home.base, "-o", tmp_path / "out.gguf")
    assert_tensors(read(tmp_path / "out.gguf").values, oracle(home, adapter))


@pytest.mark.parametrize(
    ("adapter", "base"), [("llama", "mixtral"), ("qwen3", "smollm3"), ("qwen2", "qwen3"), ("llama", "deeper")]
)
def test_an_adapter_is_not_exported_for_a_base_that_it_does_not_fit(
    adapter: str, base: str, tmp_path: Path, refuse: Refuse
) -> None:
    """llama.cpp would refuse each; other names, other shapes, a block that is not there."""
    lora, home = family(adapter).folder / "lora", family("llama" if base == "deeper" else base)
    if base == "deeper":
        lora = gguf_models.edited_adapter(lora, tmp_path / "deeper", lambda n, t: t)
        tensors = load_file(lora / "adapter_model.safetensors")
        tensors = {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}
        save_file(tensors, lora / "adapter_model.safetensors")
    command = ("convert", lora, "--to", "gguf", "--like", home.base)
    refuse(FIT, [], *command, out=tmp_path / "x.gguf")


@pytest.mark.parametrize("option", ["--like", "--base"])
def test_an_export_does_not_replace_the_base(option: str, tmp_path: Path, refuse: Refuse) -> None:
    home, base = family("llama"), tmp_path / "base.gguf"
    shutil.copy(home.base, base)
    command = ("convert", home.folder / "lora", "--to", "gguf", option, base)
    refuse(USAGE, ["base.gguf"], *command, out=base)
    try:
        refuse(USAGE, ["base.gguf"], *command, "--force", out=base)
    finally:
        assert base.read_bytes() == home.base.read_bytes()


# --- 10: further shapes of adapters and bases ------------------------------------------------------------------------


def with_biases(home: Family, folder: Path) -> Path:
    """The llama with biases of q, k and v (which transformers calls attention_bias), in llama.cpp's order of rows."""
    random, values = np.random.default_rng(5), read(home.base).values
    for block in range(2):
        for leaf, rows in (("q", 32), ("k", 16), ("v", 16)):
            values[f"blk.{block}.attn_{leaf}.bias"] = random.normal(size=rows)
    return rewrite(home.base, folder / "biased.gguf", values)


@pytest.mark.parametrize("kind", ["lora_bias", "bias"])
def test_biases_follow_the_rows(kind: str, tmp_path: Path) -> None:
    """A LoRA bias is added, a saved one replaces; both in the order of the rows."""
    home, random = family("llama"), torch.Generator().manual_seed(1)
    base, heads = with_biases(home, tmp_path), {"q": 4, "k": 2, "v": 0}
    options = {"lora_bias": True} if kind == "lora_bias" else {"bias": "lora_only"}
    adapter = gguf_models.edited_adapter(
        home.folder / "lora", tmp_path / "adapter", without("mlp", "o_proj"), **options
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    biases = {}
    for name in list(tensors):
        if name.endswith("lora_B.weight"):
            stem = name.removesuffix("lora_B.weight")
            key = stem + ("lora_B.bias" if kind == "lora_bias" else "base_layer.bias")
            biases[stem] = tensors[key] = torch.randn(len(tensors[name]), generator=random)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    run("merge", adapter, "--base", base, "-o", tmp_path / "out.gguf")
    before, found = read(base).values, read(tmp_path / "out.gguf").values
    want = oracle(home, gguf_models.edited_adapter(home.folder / "lora", tmp_path / "plain", without("mlp", "o_proj")))
    for stem, bias in biases.items():
        block, leaf = stem.split(".layers.")[1].split(".")[0], stem.split(".")[-2][0]
        name, values = f"blk.{block}.attn_{leaf}.bias", bias.double().numpy()
        ordered = interleaved(values, heads[leaf]) if heads[leaf] else values
        want[name] = before[name] + 2 * ordered if kind == "lora_bias" else ordered
    assert_tensors(found, want)


def test_quantised_halves_and_no_alpha(tmp_path: Path) -> None:
    """What llama.cpp's run time would take: lora_a in Q8_0, lora_b in F16, scale 1 where alpha is 0 or missing."""
    home, lora = family("llama"), tmp_path / "lora.gguf"
    run("convert", home.folder / "lora", "--to", "gguf", "--like", home.base, "-o", lora)

    def types(name: str, array: Floats) -> str:
        return "Q8_0" if name.endswith("lora_a") else "F16"

    for alpha in (0.0, 6.0):
        stored = rewrite(
            lora, tmp_path / f"{alpha}.gguf", read(lora).values, types, values={"adapter.lora.alpha": alpha}
        )
        run("merge", stored, "--base", home.base, "-o", tmp_path / f"m{alpha}.gguf")
        want = {n: v.copy() for n, v in read(home.base).values.items()}
        for target, product in products(stored).items():
            want[target] += product
        assert_tensors(read(tmp_path / f"m{alpha}.gguf").values, want)
        run("convert", stored, "--to", "peft", "--base", home.folder, "-o", tmp_path / f"peft{alpha}")
        run(
            "convert", tmp_path / f"peft{alpha}", "--to", "gguf", "--like", home.base, "-o", tmp_path / f"b{alpha}.gguf"
        )
        for target, product in products(stored).items():
            gguf_models.assert_close(products(tmp_path / f"b{alpha}.gguf")[target], product, target)


def test_a_split_base(tmp_path: Path, shelf: Shelf) -> None:
    """Split files stay split."""
    home, reader = family("llama"), GGUFReader(family("llama").base)
    writer = GGUFWriter(tmp_path / "base.gguf", "llama", split_max_tensors=8)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    gguf_models.copy_values(reader, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("base-*.gguf"))
    assert len(parts) == 3
    run("merge", home.folder / "dora", "--base", parts[0], "-o", tmp_path / "out.gguf")
    written = sorted(tmp_path.glob("out*"))
    assert [p.name for p in written] == [f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = read(shelf("llama", "dora")).tensors
    assert [item for p in written for item in read(p).tensors.items()] == list(whole.items())
    assert [read(p).kv for p in written] == [read(p).kv for p in parts]
    assert nmse(log_probabilities(written[0], home.tokens), home.expected()["dora"]) < EXACT


def test_another_alignment(tmp_path: Path, shelf: Shelf) -> None:
    home = family("gpt2")
    base = rewrite(home.base, tmp_path / "base.gguf", alignment=128)
    run("merge", home.folder / "dora", "--base", base, "-o", tmp_path / "out.gguf")
    found = read(tmp_path / "out.gguf")
    assert {offset % 128 for offset in found.offsets.values()} == {0}
    assert found.kv == read(base).kv
    assert found.tensors == read(shelf("gpt2", "dora")).tensors


def test_values_that_f16_cannot_hold(tmp_path: Path, refuse: Refuse) -> None:
    home = family("llama")
    for number, target in enumerate(("blk.0.attn_v.weight", "blk.0.attn_q.weight")):  # one copied, one merged
        values = read(home.base).values
        values[target][0, 0] = 1e5
        base = rewrite(home.base, tmp_path / f"{number}.gguf", values)
        command = ("merge", home.folder / "partial", "--base", base, "--gguf-type", "f16")
        refuse(FIT, [target, "65504"], *command, out=tmp_path / "out" / "x.gguf")
