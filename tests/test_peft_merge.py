"""Merging PEFT's LoRA and DoRA adapters, with PEFT itself as the oracle.

``models.CASES`` is the list of what is merged: eleven architectures with all their linear layers adapted, and every
feature of PEFT's LoRA once. Each case must give PEFT's tensors, the adapter model's logits, and survive a round trip
through our reader and writer.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import dora_tools as dt
from dora_tools.lowrank import reference_merge

from .models import (
    CASES,
    Case,
    Tensors,
    Zoo,
    assert_close,
    assert_merged_alike,
    randomised,
    stored,
    train,
    with_adapter,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
ARCHITECTURES = [name for name, case in CASES.items() if name in {f"{case.family}-lora", f"{case.family}-dora"}]
ROUNDED_TWICE = ("embed_tokens-lora-untied", "bfloat16")  # by PEFT: see test_an_embedding_is_rounded_once
HALF = [(name, "float16") for name in ("llama-lora", "llama-dora", "gpt2-dora", "embed_tokens-dora-untied")]

TENSORS, LOGITS, ROUND_TRIP, TIES = (
    "test_every_tensor_is_what_peft_merges",
    "test_the_merged_model_computes_what_the_adapter_model_computes",
    "test_reading_and_writing_an_adapter_changes_nothing",
    "test_a_tied_head_is_untied_where_the_ends_differ",
)


def merged_by_peft(case: Case, base: Path, adapter: Path, folder: Path) -> Tensors:
    """merge_and_unload, saved: by the names that the base has on disk."""
    model = with_adapter(case, base, adapter).merge_and_unload()
    model.save_pretrained(folder)
    prefix = f"{model.base_model_prefix}." if case.headless else ""
    return {name.removeprefix(prefix): tensor for name, tensor in stored(folder).items()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((n, "float32") for n, case in CASES.items() if not case.shared),
        *((n, "bfloat16") for n, case in CASES.items() if not case.shared and (n, "bfloat16") != ROUNDED_TWICE),
        *HALF,
    ],
)
def test_every_tensor_is_what_peft_merges(zoo: Zoo, tmp_path: Path, name: str, dtype: str) -> None:
    case, base, adapter = CASES[name], zoo.base(name, dtype), zoo.adapter(name, dtype)
    plan = dt.merge(adapter, base, tmp_path / "ours")

    ours, theirs, before = (
        stored(tmp_path / "ours"),
        merged_by_peft(case, base, adapter, tmp_path / "peft"),
        stored(base),
    )
    # column norms are summed in float64 here and in float32 by PEFT; the last bit of those shows in float16
    changed = assert_merged_alike(ours, theirs, before, 5e-4 if (name, dtype) == ("gpt2-dora", "float16") else 1e-4)
    assert changed >= set(plan.binding.bound), "every module has changed"
    assert changed <= {*plan.binding.bound, *plan.binding.replaced, *plan.binding.added}
    assert {f.name for f in base.glob("*.safetensors")} == {f.name for f in (tmp_path / "ours").glob("*.safetensors")}


@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_computes_what_the_adapter_model_computes(zoo: Zoo, tmp_path: Path, name: str) -> None:
    case, base, adapter = CASES[name], zoo.base(name), zoo.adapter(name)
    dt.merge(adapter, base, tmp_path / "out")

    merged, model, plain = case.load(tmp_path / "out"), with_adapter(case, base, adapter), case.load_base(base)
    assert_close(case.logits(merged), case.logits(model), 1e-5, control=case.logits(plain))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_model_needs_no_disk(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case, base, adapter = CASES[name], zoo.base(name), zoo.adapter(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = files_below(zoo.root)

    config = transformers.AutoConfig.from_pretrained(base)
    model = case.model_class.from_pretrained(None, config=config, state_dict=dt.merged(adapter, base)).eval()

    assert_close(case.logits(model), case.logits(with_adapter(case, base, adapter)), 1e-5, case.logits(case.load(base)))
    assert files_below(zoo.root) == before
    assert not list(tmp_path.iterdir())


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_lazy_tensors_are_computed_when_asked_for_and_then_forgotten(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = dt.merged(zoo.adapter("gpt2-dora"), zoo.base("gpt2-dora", "bfloat16"))
    read: list[str] = []
    original = type(lazy.checkpoint).read

    def spy(self: Any, name: str, *args: Any) -> torch.Tensor:
        read.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(type(lazy.checkpoint), "read", spy)
    promised = {name: (tensor.shape, tensor.dtype) for name, tensor in lazy.items()}
    assert not read, "names, shapes and types cost nothing"

    dt.merge(zoo.adapter("gpt2-dora"), zoo.base("gpt2-dora", "bfloat16"), tmp_path / "out")
    written = stored(tmp_path / "out")
    assert written.keys() == promised.keys()
    given: list[weakref.ref[torch.Tensor]] = []
    for name, tensor in lazy.items():
        read.clear()
        value = tensor[...]
        assert set(read) == {name}
        assert promised[name] == (value.shape, value.dtype)
        assert torch.equal(value, written[name])
        given.append(weakref.ref(value))
        assert sum(one() is not None for one in given) == 1


@pytest.mark.parametrize("name", CASES)
def test_reading_and_writing_an_adapter_changes_nothing(zoo: Zoo, tmp_path: Path, name: str) -> None:
    case, base, old, new = CASES[name], zoo.base(name), zoo.adapter(name), tmp_path / "again"
    dt.write_adapter(dt.read_adapter(old), new)

    was, now = load_file(old / "adapter_model.safetensors"), load_file(new / "adapter_model.safetensors")
    assert all(torch.equal(tensor, was[key]) and tensor.dtype == was[key].dtype for key, tensor in now.items())
    assert all("original_module" in key or "modules_to_save" in key for key in was.keys() - now.keys())
    assert adapter_config(new) == adapter_config(old)

    model = get_peft_model(case.load_base(base), PeftConfig.from_pretrained(new))
    result = model.load_adapter(new, "default")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(case.logits(model.eval()), case.logits(with_adapter(case, base, old)))


def adapter_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter, its lists sorted: PEFT writes sets, in any order."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("out", "in_", "rank"), [(48, 32, 4), (320, 200, 16), (33, 257, 3)])
def test_the_unblocked_reference_is_peft_bit_for_bit(
    dtype: torch.dtype, dora: bool, out: int, in_: int, rank: int
) -> None:
    torch.manual_seed(4)
    base = torch.nn.Sequential(torch.nn.Linear(in_, out, dtype=dtype))
    config = LoraConfig(r=rank, lora_alpha=7, use_dora=dora, target_modules=["0"])
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    randomised(layer.lora_A)
    randomised(layer.lora_B)
    magnitude = None
    if dora:
        magnitude = randomised(layer.lora_magnitude_vector)["default"].weight.detach()
    a, b = (factor["default"].weight.detach() for factor in (layer.lora_A, layer.lora_B))
    before = layer.base_layer.weight.detach().clone()
    theirs = model.merge_and_unload()[0].weight
    assert theirs.dtype == dtype
    assert torch.equal(reference_merge(before, a, b, 7 / rank, magnitude), theirs)


# What the cases of two ends of one weight, of patterns and of resized vocabularies must also say


# family → (embedding, head) by their names in the base's files
ENDS = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("model.embed_tokens.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "gpt2": ("wte.weight", "lm_head.weight"),
    "mamba": ("backbone.embeddings.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("name", [name for name in CASES if "tied" in name.split("-")])
def test_a_tied_head_is_untied_where_the_ends_differ(zoo: Zoo, tmp_path: Path, name: str) -> None:
    """As in the adapter model's forward pass. PEFT's merge would change both ends."""
    case = CASES[name]
    plan = dt.merge(zoo.adapter(name), zoo.base(name), tmp_path / "out")
    before, after = stored(zoo.base(name)), stored(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    embedding, head = ENDS[case.family]
    assert head not in before
    assert (head in after) == case.shared
    assert config.get("tie_word_embeddings", True) is not case.shared
    assert any("untied" in note for note in plan.notes) == case.shared
    if case.vocabulary:
        assert config["vocab_size"] == case.vocabulary == len(after[embedding])
    elif case.shared:
        kept, trained = (embedding, head) if "head" in name else (head, embedding)
        assert torch.equal(after[kept], before[embedding]), "the end without adapter keeps its value"
        assert not torch.equal(after[trained], before[embedding])


def test_an_embedding_is_rounded_once(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT rounds the update of an embedding before it adds it, and then the sum."""
    name, dtype, key = "embed_tokens-lora-untied", "bfloat16", "base_model.model.model.embed_tokens.lora_embedding_"
    base, adapter = zoo.base(name, dtype), zoo.adapter(name, dtype)
    dt.merge(adapter, base, tmp_path / "out")
    w, factors = stored(base)["model.embed_tokens.weight"], stored(adapter)
    expected = reference_merge(w.T, factors[key + "A"], factors[key + "B"], 6 / 4).T
    assert_merged_alike({"": stored(tmp_path / "out")["model.embed_tokens.weight"]}, {"": expected}, {})


def test_patterns_say_what_the_config_leaves_open(zoo: Zoo) -> None:
    adapter = dt.read_adapter(zoo.adapter("patterns"))
    ranks = {update.module: update.delta.rank for update in adapter.updates}  # type: ignore[attr-defined]
    scalings = {update.module: update.delta.scaling for update in adapter.updates}  # type: ignore[attr-defined]
    assert ranks["model.layers.0.self_attn.q_proj"] == 6
    assert ranks["model.layers.0.mlp.up_proj"], ranks["model.layers.1.mlp.up_proj"] == (2, 4)
    assert scalings["model.layers.0.self_attn.q_proj"] == 24 / 6
    assert scalings["model.layers.1.self_attn.q_proj"] == 2 / 6, "sorted by PEFT, '1\\..*' comes before 'q_proj'"
    assert scalings["model.layers.1.mlp.up_proj"] == 1.5 / 4
    for said in ("rank_pattern: 'absent' matches no module", "alpha_pattern has 2 patterns that match"):
        assert any(said in note for note in adapter.notes)
    assert not any("layers.0.self_attn.q_proj" in note for note in adapter.notes)


# Layers that transformers does not have, or has no longer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_experts_that_were_adapted_one_by_one(zoo: Zoo, tmp_path: Path, dtype: str, dora: bool) -> None:
    """As transformers 4 had them, and as checkpoints still do. PEFT cannot load these any more; numpy can."""
    base, adapter = zoo.base("mixtral-lora", dtype), tmp_path / "adapter"
    before = stored(base)
    noise = np.random.default_rng(6)
    tensors: Tensors = {}
    expected = dict(before)
    for name in (name for name in before if ".block_sparse_moe.experts." in name):
        w = before[name].double().numpy()
        shapes = (3, w.shape[1]), (w.shape[0], 3), (w.shape[0],)
        a, b, m = (np.asarray(noise.normal(0, 0.1, shape), np.float32) for shape in shapes)
        merged = w + 5 / 3 * (b.astype(np.float64) @ a.astype(np.float64))
        if dora:
            merged *= (m / np.linalg.norm(merged, axis=1))[:, None]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": torch.from_numpy(a), f"{key}.lora_B.weight": torch.from_numpy(b)}
        tensors |= {f"{key}.lora_magnitude_vector": torch.from_numpy(m)} if dora else {}
        expected[name] = torch.from_numpy(merged).to(before[name].dtype)
    assert len(expected) == len(before)
    assert len(tensors) == 2 * 3 * 3 * (3 if dora else 2), "2 layers, 3 experts, w1, w2 and w3"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_dora": dora, "target_modules": ["w1", "w2", "w3"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    dt.merge(adapter, base, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert len(assert_merged_alike(after, expected, before)) == 2 * 3 * 3
    experts = CASES["mixtral-lora"].load(tmp_path / "out").model.layers[1].mlp.experts
    gate = after["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    assert torch.equal(experts.gate_up_proj[2, : len(gate)], gate)


class Convolutions(torch.nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, kernel: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(7)
        layer: Any = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(kernel) - 1]
        self.first = layer(3, 8, kernel, stride=2, padding=1)
        self.second = layer(8, 6, 1 if len(kernel) < 3 else 2, bias=False)
        self.last = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu()).flatten(2).mean(2)
        result: torch.Tensor = self.last(y)
        return result


FLAT = (1, 1, 3)  # PEFT computes with such a kernel, but crashes when it merges it or takes its norm
KERNELS: list[tuple[int, ...]] = [(3,), (3, 2), (3, 2, 3)]


@pytest.mark.parametrize(
    ("kernel", "dora"), [*((k, d) for k in KERNELS for d in (False, True)), (FLAT, False)], ids=str
)
def test_convolutions(tmp_path: Path, kernel: tuple[int, ...], dora: bool) -> None:
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"
    x = torch.randn(2, 3, *[9] * len(kernel), generator=torch.Generator().manual_seed(8))
    save_file(Convolutions(kernel).state_dict(), base)
    config = LoraConfig(r=4, lora_alpha=6, use_dora=dora, target_modules=["first", "second", "last"])
    train(get_peft_model(Convolutions(kernel), config), {"x": x}).save_pretrained(adapter)

    dt.merge(adapter, base, out)
    model = PeftModel.from_pretrained(Convolutions(kernel), adapter).eval()
    merged = Convolutions(kernel)
    merged.load_state_dict(stored(out))
    with torch.no_grad():
        assert_close(merged(x), model(x), 1e-5, control=Convolutions(kernel)(x))
    if kernel != FLAT:
        changed = assert_merged_alike(stored(out), model.merge_and_unload().state_dict(), stored(base))
        assert changed == {"first.weight", "second.weight", "last.weight"}


# The same adapter, or the same base, stored in other ways


def rewritten(change: Callable[[str], str]) -> Callable[[Path, Any], None]:
    """An adapter whose keys are changed."""

    def rewrite(folder: Path, model: Any) -> None:
        model.save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
        save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)

    return rewrite


def before_leaf(key: str, infix: str) -> str:
    """``….lora_A.weight`` → ``….lora_A.default.weight``; a magnitude, saved without ``.weight``, gets one."""
    stem, _, last = key.rpartition(".")
    return f"{key}{infix}.weight" if last == "lora_magnitude_vector" else f"{stem}{infix}.{last}"


def saved_under_a_name(folder: Path, model: Any) -> None:
    model.load_adapter(model.here, "other")
    model.save_pretrained(folder, selected_adapters=["other"])
    assert (folder / "other/adapter_config.json").exists()


ADAPTER_FORMS: dict[str, Callable[[Path, Any], None]] = {
    "adapter_model.bin": lambda folder, model: model.save_pretrained(folder, safe_serialization=False),
    "named": saved_under_a_name,
    "infix": rewritten(lambda key: before_leaf(key, ".default")),
    "magnitude.weight": rewritten(lambda key: before_leaf(key, "")),
    "no prefix": rewritten(lambda key: key.removeprefix("base_model.model.")),
    "ddp": rewritten("module.{}".format),
    "compiled": rewritten("_orig_mod.{}".format),
    "compiled inside": rewritten(lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")),
    "ddp of compiled": rewritten("module._orig_mod.{}".format),
    "fsdp": rewritten(lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module.")),
}


@pytest.mark.parametrize("form", ADAPTER_FORMS)
def test_forms_of_one_adapter(zoo: Zoo, tmp_path: Path, form: str) -> None:
    name = "llama-dora"
    dt.merge(zoo.adapter(name), zoo.base(name), tmp_path / "expected")
    model = with_adapter(CASES[name], zoo.base(name), zoo.adapter(name))
    model.here = zoo.adapter(name)
    ADAPTER_FORMS[form](tmp_path / "adapter", model)
    dt.merge(tmp_path / "adapter", zoo.base(name), tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "expected")


def save_bins(folder: Path, shards: list[Tensors]) -> None:
    names = ["pytorch_model.bin"]
    if len(shards) > 1:
        names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
        index = {"weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)


def halves(tensors: Tensors) -> Iterator[Tensors]:
    names = sorted(tensors)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        yield {name: tensors[name] for name in part}


BASE_FORMS: dict[str, Callable[[Path, Tensors], None]] = {
    "model.safetensors": lambda folder, tensors: save_file(tensors, folder / "model.safetensors", {"format": "pt"}),
    "pytorch_model.bin": lambda folder, tensors: save_bins(folder, [tensors]),
    "shards of .bin": lambda folder, tensors: save_bins(folder, list(halves(tensors))),
}


@pytest.mark.parametrize("form", BASE_FORMS)
@pytest.mark.parametrize("name", ["llama-dora", "gpt2-dora"])
def test_forms_of_one_base(zoo: Zoo, tmp_path: Path, name: str, form: str) -> None:
    original, base = zoo.base(name, "bfloat16"), tmp_path / "base"
    base.mkdir()
    shutil.copy(original / "config.json", base)
    BASE_FORMS[form](base, stored(original))
    dt.merge(zoo.adapter(name), original, tmp_path / "expected")
    dt.merge(zoo.adapter(name), base, tmp_path / "out")
    assert_identical(stored(tmp_path / "out"), stored(tmp_path / "expected"))
    CASES[name].load(tmp_path / "out")


def assert_identical(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


# Same bytes whatever the machine does


@pytest.mark.parametrize("name", ["llama-lora", "llama-dora", "gpt2-dora", "embed_tokens-dora-untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_do_not_depend_on_threads(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    base, adapter = zoo.base(name, dtype), zoo.adapter(name, dtype)
    dt.merge(adapter, base, tmp_path / "one tile")
    monkeypatch.setattr("dora_tools.checkpoint.TILE_ELEMENTS", 100)  # three rows a tile
    for threads in (1, 2, 3, 5):
        dt.merge(adapter, base, tmp_path / f"{threads}", threads=threads)
        assert weight_files(tmp_path / f"{threads}") == weight_files(tmp_path / "1")
    assert_merged_alike(stored(tmp_path / "1"), stored(tmp_path / "one tile"), stored(base))


@pytest.mark.parametrize("name", ["llama-dora", "gpt2-dora", "embed_tokens-dora-untied"])
def test_rows_are_the_same_in_whatever_portions_they_are_read(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("dora_tools.checkpoint.TILE_ELEMENTS", 100)
    whole = dt.merged(zoo.adapter(name), zoo.base(name)).checkpoint
    parts = dt.merged(zoo.adapter(name), zoo.base(name)).checkpoint  # another, which has not read anything before
    for tensor, info in parts.tensors.items():
        for start, stop in [(5, 6), (1, 20), (7, 31), (info.rows - 1, info.rows), (0, 1), (2, info.rows)]:
            if stop <= info.rows:
                assert torch.equal(parts.read(tensor, start, stop), whole.read(tensor)[start:stop])


# Real models


@pytest.mark.parametrize("name", ["minilm-dora", "smollm2-dora", "smollm2-lora", "smollm2-rslora"])
def test_real_models_give_the_recorded_outputs(real_model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """See fixtures/make_peft_adapters.py for what was recorded: PEFT's adapter model in float32, and the base alone."""
    import make_peft_adapters

    task = next(spec for spec in make_peft_adapters.SPECS if spec.name == name).task
    adapter, base = make_peft_adapters.FIXTURES / name, real_model(name.split("-")[0])
    recorded = {k: torch.from_numpy(v) for k, v in np.load(make_peft_adapters.EXPECTED / f"{name}.npz").items()}
    dt.merge(adapter, base, tmp_path / "f32", dtype="float32")

    auto = transformers.AutoModel if name.startswith("minilm") else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "f32", dtype="auto").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        computed = task.outputs(model, {key: recorded[key] for key in ("input_ids", "attention_mask")})
    for key in computed.keys() & {"embeddings", "logits", "hidden"}:
        assert_close(computed[key], recorded[key], 1e-5, control=recorded[f"base_{key}"])
    if "argmax" in computed:
        assert torch.equal(computed["argmax"], recorded["argmax"])

    dt.merge(adapter, base, tmp_path / "own")
    theirs = (
        PeftModel.from_pretrained(auto.from_pretrained(base, dtype="auto"), adapter).merge_and_unload().state_dict()
    )
    ours, before = stored(tmp_path / "own"), stored(base)
    assert theirs.keys() - ours.keys() <= {"lm_head.weight"}, "tied"
    changed = assert_merged_alike(ours, {key: theirs.get(key, before[key]) for key in ours}, before)
    assert len(changed) == len(dt.read_adapter(adapter).updates)
