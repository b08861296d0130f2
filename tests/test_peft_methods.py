"""PEFT's methods other than LoRA, as its own versions saved them: merged, in part and in blocks, written, refused.

The oracle for weights is ``fixtures/make_peft_methods.py``, a formula in float64 for every method; for what comes out
of the model, what the trained model itself computed (``expected.npz``).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_tools import api, checkpoint, formats
from dora_tools.adapter import LowRank
from dora_tools.binding import bind
from dora_tools.checkpoint import Checkpoint, Tensors, constant, ref
from dora_tools.errors import DoraToolsError, FitError, InputError, UnsupportedError, UsageError
from dora_tools.formats import Given
from dora_tools.formats.peft.methods import METHODS
from dora_tools.merging import Merged
from dora_tools.names.ties import CONV1D_LAYERS
from dora_tools.opening import with_base
from dora_tools.summary import Summary

from .peft_cases import BASES, LOST, Case, cases, network, outputs, peft_marks

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
CASES = cases(*METHODS)
FIRST = list({case.kind: case for case in reversed(CASES)}.values())  # one of each method
BY_NAME = {case.name: case for case in CASES}
CLOSE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch's own threads wait for each other longer than matrices of this size take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(case: Case) -> str:
    return case.name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def merge(adapter: Path, base: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    api.merge(adapter, base, out, **options)
    return stored(out)


def computed(case: Case, merged: Path) -> np.ndarray[Any, Any]:
    if case.is_network:
        shutil.copy(case.base / "network.json", merged)
    return outputs(network(merged), case.inputs)


def by_formula(case: Case, weights: Mapping[str, torch.Tensor], adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """What the oracle makes of the tensors that change, in float64."""
    import make_peft_methods

    turned = case.facts["base"] == "gpt2"
    made: dict[str, torch.Tensor] = make_peft_methods.merge(
        adapter or case.path, weights, lambda module: turned and module.rpartition(".")[2] in CONV1D_LAYERS
    )
    return made


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert found.shape == expected.shape
    off = float((found.double() - expected).abs().max())
    assert off < 2e-6 * max(1.0, float(expected.abs().max())), f"{name}: {off}"


def test_every_method_has_a_case() -> None:
    assert {case.kind for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_merged_as_trained(case: Case, tmp_path: Path) -> None:
    merge(case.path, case.base, tmp_path / "out")
    found = computed(case, tmp_path / "out")
    assert found.shape == case.expected.shape
    assert np.abs(found - case.expected).max() < CLOSE
    assert case.facts["differs_from_base"] > 100 * CLOSE


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_in_part_and_in_blocks(case: Case, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W + strength (W' − W), computed a few rows at a time; nothing else changes."""
    monkeypatch.setattr(checkpoint, "TILE_ELEMENTS", 200)
    before = stored(case.base)
    found = merge(case.path, case.base, tmp_path / "out", strength=strength, threads=2)
    expected = by_formula(case, before)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        if name in expected:
            whole = tensor.double()
            assert_near(found[name], whole + strength * (expected[name] - whole), name)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", FIRST, ids=ids)
def test_half_precision_is_rounded_once(case: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    weights = {name: tensor.bfloat16() for name, tensor in stored(case.base).items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = merge(case.path, base, tmp_path / "out")
    for name, exact in by_formula(case, weights).items():
        rounded = exact.bfloat16()
        apart = (found[name].view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
        small = (found[name].double() - exact).abs() < 1e-6
        assert found[name].dtype == torch.bfloat16
        assert bool(((apart <= 1) | small).all()), name
        assert float((apart == 0).double().mean()) > 0.97, name


@pytest.mark.parametrize("case", FIRST, ids=ids)
def test_threads_do_not_show(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TILE_ELEMENTS", 200)
    for threads in (1, 3):
        merge(case.path, case.base, tmp_path / str(threads), threads=threads)
    one, three = ((tmp_path / n / "model.safetensors").read_bytes() for n in "13")
    assert one == three


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_written_back(case: Case, tmp_path: Path) -> None:
    """It is read again as the same, and PEFT computes with it what was trained, also where it misreads the original."""
    api.convert(case.path, tmp_path / "again", "peft", base=case.base)
    one = merge(case.path, case.base, tmp_path / "one")
    two = merge(tmp_path / "again", case.base, tmp_path / "two")
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    if case.name not in LOST:
        assert np.abs(of_peft(tmp_path / "again", case) - case.expected).max() < CLOSE


def of_peft(adapter: Path, case: Case) -> np.ndarray[Any, Any]:
    """What PEFT computes with an adapter, of which it uses every tensor and misses none."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    model = PeftModel(network(case.base), config)
    said = model.load_adapter(str(adapter), "default", is_trainable=False)
    marks = peft_marks(config.peft_type.value)
    # the bank is the model's own, and those of the layers are it
    missing = [k for k in said.missing_keys if any(m in k for m in marks) and ".vblora_vector_bank" not in k]
    assert not missing
    assert not said.unexpected_keys
    return outputs(model.eval(), case.inputs)


@pytest.mark.parametrize("with_base", [False, True])
def test_inspecting_needs_no_torch(with_base: bool) -> None:
    todo = [["inspect", str(case.path), *(["--base", str(case.base)] if with_base else [])] for case in CASES]
    code = (
        "import json, sys; from dora_tools.cli import main\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    assert main(arguments) == 0, arguments\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(todo), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" parameters; base:") == len(CASES)


def test_several_methods_at_once(tmp_path: Path) -> None:
    """Each is merged from the pristine base, and their changes are added up."""
    chosen = [BY_NAME[name] for name in ("oft", "hira", "vera", "loha", "road-1")]
    before, strengths = stored(BASES / "llama"), [0.5, 1.0, -0.5, 0.25, 1.0]
    merge([case.path for case in chosen], BASES / "llama", tmp_path / "out", strength=strengths)  # type: ignore[arg-type]
    found = stored(tmp_path / "out")
    made = [by_formula(case, before) for case in chosen]
    for name, tensor in before.items():
        whole = tensor.double()
        changes = [s * (m[name] - whole) for s, m in zip(strengths, made, strict=True) if name in m]
        assert_near(found[name], whole + sum(changes), name)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("module", ["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
@pytest.mark.parametrize("kind", ["OFT", "OFT old", "BOFT", "HRA", "ROAD", "MISS", "FOURIERFT", "SHIRA", "IA3"])
def test_stored_by_columns(kind: str, module: str, strength: float) -> None:
    """Of a base that stores (in, out), also where PEFT has no such layer, and of square weights."""
    import make_peft_methods

    torch.manual_seed(6)
    base, path = api.open_checkpoint(BASES / "gpt2"), f"transformer.h.0.{module}"
    weight = stored(BASES / "gpt2")[f"{path}.weight"].T.double()
    out, in_ = weight.shape
    made: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "OFT": ({"oft_R.weight": torch.randn(in_ // 8, 28) * 0.3}, {"peft_version": "0.21.2"}),
        "OFT old": ({"oft_r": torch.randn(4, out // 4, out // 4)}, {"r": 4}),
        "BOFT": ({"boft_R": torch.randn(3, in_ // 4, 4, 4), "boft_s": torch.rand(out, 1) + 0.5}, {}),
        "HRA": ({"hra_u": torch.randn(in_, 3)}, {"apply_GS": False}),
        "ROAD": ({"road_theta": torch.randn(out), "road_alpha": torch.randn(out)}, {}),
        "MISS": ({"miss_block": torch.randn(out // 8, 8, 8)}, {"init_weights": "bat"}),
        "FOURIERFT": ({"fourierft_spectrum": torch.randn(50)}, {"scaling": 30.0, "random_loc_seed": 4}),
        "SHIRA": ({"shira_weight": torch.randn(2), "shira_indices": torch.tensor([[0, out - 1], [in_ - 1, 3]])}, {}),
        "IA3": ({"ia3_l": torch.randn(out, 1)}, {"feedforward_modules": []}),
    }
    tensors, options = made[kind]
    always = {"variant": "road_2", "group_size": 16, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
    config = {**always, "coft": False, "fan_in_fan_out": True, "feedforward": False, **options}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    _, formula = make_peft_methods.METHODS[kind.split()[0]]
    if kind == "OFT old":
        formula = make_peft_methods.oft_output
    expected = weight + strength * (formula(weight, exact, config) - weight)
    named = {f"base_model.model.{path}.{leaf}": tensor for leaf, tensor in tensors.items()}
    reading = formats.read(opened(named, {**config, "peft_type": kind.split()[0]}), "it", given=with_base(None, base))
    merged = Merged(bind([(reading.adapter, strength)], base))
    found = merged.read(next(name for name in merged.merged if name.endswith("weight")))
    assert_near(found.T, expected, kind)


@pytest.mark.parametrize("kind", ["FOURIERFT", "SHIRA", "MISS", "OFT", "BOFT", "IA3", "LOHA", "LOKR", "VERA", "ROAD"])
def test_into_a_gguf(kind: str) -> None:
    """Whose q has its rows in another order: the same as into the Hugging Face model, or refused where rows mix."""
    from .gguf_models import family

    torch.manual_seed(8)
    model, path = family("llama"), "model.layers.0.self_attn.q_proj"
    hf, gguf = api.open_checkpoint(model.folder / "model.safetensors"), api.open_checkpoint(model.base)
    out, in_ = hf.tensors[f"{path}.weight"].shape
    made: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "FOURIERFT": ({"fourierft_spectrum": torch.randn(50)}, {"scaling": 30.0, "random_loc_seed": 4}),
        "SHIRA": ({"shira_weight": torch.randn(2), "shira_indices": torch.tensor([[1, out - 1], [in_ - 1, 3]])}, {}),
        "MISS": ({"miss_block": torch.randn(3, 4)}, {"init_weights": "mini"}),
        "OFT": ({"oft_R.weight": torch.randn(in_ // 8, 28) * 0.3}, {"use_cayley_neumann": False}),
        "BOFT": ({"boft_R": torch.randn(1, in_ // 4, 4, 4), "boft_s": torch.rand(out, 1) + 0.5}, {}),
        "IA3": ({"ia3_l": torch.randn(out, 1)}, {}),
        "LOHA": (
            {f"hada_w{n}_{x}": torch.randn(*((out, 2) if x == "a" else (2, in_))) for n in "12" for x in "ab"},
            {},
        ),
        "LOKR": (
            {"lokr_w1": torch.randn(4, 2), "lokr_w2": torch.randn(out // 4, in_ // 2)},
            {"rank_dropout_scale": False},
        ),
        "VERA": ({"vera_lambda_d": torch.randn(3), "vera_lambda_b": torch.randn(out)}, {}),
        "ROAD": (
            {"road_theta": torch.randn(out), "road_alpha": torch.randn(out)},
            {"variant": "road_2", "group_size": 8},
        ),
    }
    tensors, options = made[kind]
    named = {f"base_model.model.{path}.{leaf}": tensor for leaf, tensor in tensors.items()}
    if kind == "VERA":
        named |= {"base_model.vera_A": torch.randn(3, in_ + 2), "base_model.vera_B": torch.randn(out + 1, 3)}
    found = []
    for base, name in ((hf, f"{path}.weight"), (gguf, "blk.0.attn_q.weight")):
        reading = formats.read(opened(named, {**options, "peft_type": kind}), "it", given=with_base(None, base))
        if kind == "ROAD" and base is gguf:
            with pytest.raises(UnsupportedError, match="mixes the rows"):
                bind([(reading.adapter, 1.0)], base)
            return
        found.append(Merged(bind([(reading.adapter, 1.0)], base)).read(name))
    expected = torch.from_numpy(model.transformed("blk.0.attn_q.weight", found[0].double().numpy()).copy())
    assert float((found[0] - hf.read(f"{path}.weight")).abs().max()) > 0.01
    assert_near(found[1], expected, kind)


# What PEFT does and no fixture has


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RandLoraConfig", {"r": 12, "save_projection": False, "sparse": True}),
        ("RandLoraConfig", {"r": 12, "save_projection": False, "very_sparse": True, "randlora_alpha": 30}),
        ("RandLoraConfig", {"r": 12, "save_projection": True}),
        ("VeraConfig", {"r": 5, "save_projection": False, "projection_prng_key": 12, "target_modules": ["up_proj"]}),
        ("HiraConfig", {"r": 3, "target_modules": ["embed_tokens", "lm_head"]}),
        ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": ["embed_tokens"]}),
        ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 8, "topk": 1, "save_only_topk_weights": True}),
        *(("WaveFTConfig", {"n_frequency": 300, "wavelet_family": f, "scaling": 3.0})
          for f in ("db3", "db10", "sym5", "sym8", "coif1", "coif4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)  # fmt: skip
def test_as_peft_computes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    base, case = BASES / "llama", BY_NAME["vera"]
    torch.manual_seed(3)
    config = getattr(peft, kind)(**{"target_modules": ["q_proj", "down_proj"], **options})
    model = peft.get_peft_model(network(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (2.0 if "waveft" in name or "logits" in name else 0.2))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "out")
    expected = outputs(model.eval(), case.inputs)
    assert np.abs(expected - outputs(network(base), case.inputs)).max() > 0.05
    assert np.abs(outputs(network(tmp_path / "out"), case.inputs) - expected).max() < 3e-5


@pytest.mark.parametrize("family", ["db1", "db2"])
def test_wavelets_of_odd_sizes(family: str) -> None:
    import make_peft_methods

    base, spectrum = api.open_checkpoint(BASES / "convs"), torch.randn(30)
    weight = stored(BASES / "convs")["head.weight"].double()  # (5, 14)
    config = {"scaling": 2.0, "random_loc_seed": 3, "use_idwt": True, "wavelet_family": family, "peft_type": "WAVEFT"}
    tensors = {"base_model.model.head.waveft_spectrum": spectrum}
    reading = formats.read(opened(tensors, config), "it", given=with_base(None, base))
    found = Merged(bind([(reading.adapter, 1.0)], base)).read("head.weight")
    assert_near(found, make_peft_methods.waveft(weight, {"waveft_spectrum": spectrum.double()}, config), family)


# Versions


def changed(case: Case, folder: Path, **options: Any) -> Path:
    """The adapter with other options; those that are ... are left out."""
    shutil.copytree(case.path, folder)
    config = {k: v for k, v in {**case.config, **options}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "options", "version"),
    [
        ("lokr-peft-0-12-0", {"rank_dropout_scale": False}, "0.13.2"),
        ("lokr", {"rank_dropout_scale": ..., "peft_version": ...}, "0.14.0"),
        ("loha-patterns-peft-0-12-0", {"exclude_modules": None}, "0.14.0"),
        ("loha-patterns", {"exclude_modules": ..., "peft_version": ...}, "0.15.0"),
        ("oft-peft-0-17-1", {"peft_version": "0.21.2"}, "0.16.0"),
        ("oft", {"peft_version": ...}, "0.18.0"),
    ],
)
def test_the_version_that_is_said_counts(name: str, options: dict[str, Any], version: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    adapter = changed(case, tmp_path / "adapter", **options)
    right = merge(adapter, case.base, tmp_path / "right", given=Given(peft_version=version))
    wrong = merge(adapter, case.base, tmp_path / "wrong")
    assert np.abs(computed(case, tmp_path / "right") - case.expected).max() < CLOSE
    assert max(float((right[n] - wrong[n]).abs().max()) for n in right) > 1e-4


def test_patterns_that_only_a_version_tells_are_noted(tmp_path: Path) -> None:
    adapter = changed(BY_NAME["loha-patterns-peft-0-12-0"], tmp_path / "adapter", exclude_modules=None)
    notes = api.read_adapter(adapter).notes
    assert [n for n in notes if "--peft-version 0.14.0" in n and "layers.1.self_attn.q_proj" in n]
    assert not [n for n in api.read_adapter(BY_NAME["loha-patterns"].path).notes if "--peft-version" in n]


# What is left out


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("adalora", 3, "pruned all ranks"),
        ("adalora-gpt2", 3, "pruned all ranks"),
        ("boft-peft-0-12-0", 1, "permutation"),
        ("randlora", 2, "a second copy of base_model.randlora_"),
        ("vera", 0, ""),
    ],
)
def test_left_out(name: str, count: int, reason: str) -> None:
    found = api.inspect(BY_NAME[name].path)
    assert isinstance(found, Summary)
    assert len(found.left_out) == count
    assert all(reason in said for said in found.left_out.values())


# Refusals


def opened(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Checkpoint:
    refs = {name: constant(tensor, name) for name, tensor in tensors.items()}
    return Tensors(refs, metadata={"adapter_config": dict(config)})


def all_of(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: Checkpoint, given: Given | None = None
) -> None:
    """Read, bind and compute everything that changes."""
    reading = formats.read(opened(tensors, config), "it", "peft", with_base(given, base))
    binding = bind([(reading.adapter, 1.0)], base)
    merged = Merged(binding)
    for name in binding.bound:
        merged.read(name)


def parts(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any], Checkpoint]:
    return dict(load_file(case.path / "adapter_model.safetensors")), dict(case.config), api.open_checkpoint(case.base)


def test_a_larger_kernel_is_no_oft() -> None:
    _, config, base = parts(BY_NAME["oft-conv"])
    tensors = {"base_model.model.square.oft_R.weight": torch.randn(9, 28)}
    with pytest.raises(UnsupportedError, match=r"square is a convolution of 3 × 3.*overlap"):
        all_of(tensors, config, base)


def test_a_bias_that_is_not_there() -> None:
    tensors, config, _ = parts(BY_NAME["beft"])
    with pytest.raises(FitError, match=r"self_attn.q_proj.bias"):
        all_of(tensors, config, api.open_checkpoint(BASES / "llama"))
    tensors = {name: torch.randn(1, 20) for name in tensors}
    with pytest.raises(FitError, match=r"20 outputs"):
        all_of(tensors, config, api.open_checkpoint(BASES / "llama-bias"))


@pytest.mark.parametrize("name", ["vera-key", "pvera-key", "randlora-key", "randlora-gpt2"])
def test_projections_are_drawn_for_a_base(name: str) -> None:
    adapter = api.read_adapter(BY_NAME[name].path)
    with pytest.raises(InputError, match=r"save_projection is false.*--base"):
        api.merged(adapter, BY_NAME[name].base)
    merged = api.merged(BY_NAME[name].path, BY_NAME[name].base)
    assert all(merged[key][...].isfinite().all() for key in merged)


@pytest.mark.parametrize("given", [Given(alpha=3), Given(scaling=1.5), Given(scale_rule="one")])
def test_a_scaling_of_the_users_is_for_lora(given: Given) -> None:
    with pytest.raises(UsageError, match="LOHA adapter says its own"):
        api.read_adapter(BY_NAME["loha"].path, given=given)


@pytest.mark.parametrize("extra", [("lokr_w1_a",), ("lokr_w1_b",), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2",)])
def test_tensors_that_would_not_be_used(extra: tuple[str, ...]) -> None:
    tensors, config, base = parts(BY_NAME["lokr"])
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors |= {f"{path}.{leaf}": torch.ones(4, 4) for leaf in extra}
    with pytest.raises(InputError):
        all_of(tensors, config, base)
    lycoris, _ = lycoris_parts("lycoris-lokr")
    lycoris |= {f"lycoris_model_layers_0_self_attn_q_proj.{leaf}": torch.ones(4, 4) for leaf in extra}
    with pytest.raises(InputError, match="which is it"):
        merged_lycoris(lycoris, base)


def test_unknown_leaves() -> None:
    for case in FIRST:
        tensors, config, base = parts(case)
        first = next(iter(tensors))
        begin = sorted(METHODS[case.kind].leaves)[0]
        foreign = first.rpartition("model.layers")[0] + f"model.layers.0.mlp.up_proj.{begin}_new"
        if case.kind in ("LN_TUNING",):
            continue
        with pytest.raises(UnsupportedError, match=f"'{begin}_new'"):
            all_of({**tensors, foreign: torch.ones(2, 2)}, config, base)


def test_the_wrong_base() -> None:
    for case in FIRST:
        tensors, config, _ = parts(case)
        other = BASES / ("gpt2" if case.facts["base"] != "gpt2" else "llama")
        with pytest.raises((FitError, InputError)):
            all_of(tensors, config, api.open_checkpoint(other))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lokr", {"alpha": 0}, "erase the adapter"),
        ("loha", {"r": "8"}, "not a number"),
        ("gralora", {"alpha": 0}, "erase the adapter"),
        ("fourierft", {"scaling": 0}, "erase the adapter"),
        ("fourierft", {"random_loc_seed": -1}, "random_loc_seed must be a whole number"),
        ("waveft", {"wavelet_family": "coif5"}, "wavelet_family is 'coif5'"),
        ("waveft", {"use_idwt": "yes"}, "use_idwt must be true or false"),
        ("road-1", {"variant": "road_3"}, "variant is 'road_3'"),
        ("road-1", {"group_size": 6}, "no groups of 6"),
        ("oft", {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms must be a whole number of 1 to 1000"),
        ("oft", {"use_cayley_neumann": ...}, "use_cayley_neumann must be true or false"),
        ("oft-coft", {"eps": None}, "eps must be a number"),
        ("vblora", {"topk": 13}, "topk must be a whole number of 1 to 12"),
        ("ia3-conv", {"feedforward_modules": 3}, "feedforward_modules must be a list of names"),
        ("adalora", {"init_r": 0}, "init_r must be a whole number"),
        ("vera-key", {"projection_prng_key": "7"}, "projection_prng_key must be a whole number"),
        ("miss-mini", {"init_weights": True}, "a weight of 8 outputs"),
        ("miss-bat", {"init_weights": True}, r"has shape \[8, 4, 4\]; expected \[rank, out\]"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], message: str) -> None:
    tensors, config, base = parts(BY_NAME[name])
    config = {k: v for k, v in {**config, **options}.items() if v is not ...}
    with pytest.raises(DoraToolsError, match=message):
        all_of(tensors, config, base)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hra", lambda t: t.long(), "it holds fractions"),
        ("shira", lambda t: t.float(), "it holds integers"),
        ("shira", lambda t: t * 1000 if not t.is_floating_point() else t, "goes to row"),
        ("vblora-topk", lambda t: t + 100 if t.dtype == torch.uint8 else t, "of a bank of 12"),
        ("oft", lambda t: t[:, :27], "27 entries a block"),
        ("boft-2", lambda t: t[:, :3] if t.ndim == 4 else t, "no butterfly of 2 factors"),
        ("gralora", lambda t: t[..., :3] if t.shape[-1] == 4 else t[:, :3], "not a multiple of 2 blocks"),
        ("fourierft", lambda t: torch.ones(2000), "at least 2000 entries"),
        ("vera", lambda t: t[:, :40] if t.shape[-1] == 48 else t, "at most 32 outputs and 40 inputs"),
        ("vera-key", lambda t: torch.ones(1 << 25) if len(t) == 4 else t, "random numbers would have to be drawn"),
        ("loha", lambda t: torch.full_like(t, torch.nan), "NaN or Inf"),
    ],
)
def test_tensors_that_make_no_sense(name: str, change: Any, message: str) -> None:
    tensors, config, base = parts(BY_NAME[name])
    with pytest.raises(DoraToolsError, match=message):
        all_of({key: change(tensor) for key, tensor in tensors.items()}, config, base)


@pytest.mark.parametrize("case", FIRST, ids=ids)
def test_a_missing_or_misshapen_tensor_is_no_traceback(case: Case) -> None:
    tensors, config, base = parts(case)
    module = next(iter(tensors)).rpartition(".")[0].removesuffix(".oft_R").removesuffix(".ln_tuning_layers")
    own = [key for key in tensors if key.startswith(module) or "layers" not in key]
    alone = len([key for key in tensors if key.startswith(module)]) == 1
    for key in own:
        tensor = tensors[key]
        for wrong in (
            None,
            tensor.unsqueeze(0),
            tensor.flatten(),
            tensor.flatten()[:1].reshape(()),
            tensor[..., :0],
            tensor[:-1],
            torch.cat([tensor, tensor]),
            tensor[..., :1],
            tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32),
            tensor.bool(),
        ):
            less = {k: v for k, v in {**tensors, key: wrong}.items() if v is not None}
            try:
                all_of(less, config, base)
            except DoraToolsError as error:
                assert len(str(error)) > 30
            else:
                assert wrong is not None or alone or case.kind in ("LN_TUNING", "RANDLORA"), key


IRRELEVANT = {
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "revision",
    "task_type",
    "target_modules",
    "peft_type",
}


@pytest.mark.parametrize("case", FIRST, ids=ids)
def test_a_strange_option_is_no_traceback(case: Case) -> None:
    tensors, config, base = parts(case)
    for name in config.keys() - IRRELEVANT:
        for wrong in ("x", -1, 0, 1.5, 10**400, None, ["("], {"(": 1}, {"a": "b"}, True, ...):
            strange = {k: v for k, v in {**config, name: wrong}.items() if v is not ...}
            try:
                all_of(tensors, strange, base)
            except DoraToolsError as error:
                assert len(str(error)) > 30


def test_low_rank_updates_can_become_plain_lora(tmp_path: Path) -> None:
    """Those that are of low rank exactly go where LoRA goes."""
    for name in ("vera", "adalora", "vblora", "delora", "gralora-hybrid", "miss", "pvera-key"):
        case = BY_NAME[name]
        reading = formats.read(api.open_checkpoint(case.path), "it", "peft", with_base(None, case.base))
        assert all(isinstance(update.delta, LowRank) for update in reading.adapter.updates), name
        api.convert(case.path, tmp_path / name, "peft", base=case.base, fold_scaling=True)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        merge(tmp_path / name, case.base, tmp_path / f"{name}-merged")
        assert np.abs(computed(case, tmp_path / f"{name}-merged") - case.expected).max() < CLOSE


# LyCORIS' own files


LYCORIS = [Case(path.parent.name) for path in sorted((BASES.parent).glob("lycoris-*/case.json"))]


def lycoris_formula(case: Case, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import make_peft_methods

    made: dict[str, torch.Tensor] = make_peft_methods.merge_lycoris(case.path, weights)
    return made


@pytest.mark.parametrize("case", LYCORIS, ids=ids)
def test_lycoris(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, before = case.path / "lycoris.safetensors", stored(case.base)
    merge(adapter, case.base, tmp_path / "out")
    assert np.abs(computed(case, tmp_path / "out") - case.expected).max() < CLOSE
    assert case.facts["differs_from_base"] > 100 * CLOSE
    monkeypatch.setattr(checkpoint, "TILE_ELEMENTS", 200)
    expected = lycoris_formula(case, before)
    found = merge(adapter, case.base, tmp_path / "half", strength=0.5)
    for name, tensor in before.items():
        whole = tensor.double()
        if name in expected:
            assert_near(found[name], whole + 0.5 * (expected[name] - whole), name)
        else:
            assert torch.equal(found[name], tensor)


def lycoris_parts(name: str) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    case = next(case for case in LYCORIS if case.name == name)
    return dict(load_file(case.path / "lycoris.safetensors")), api.open_checkpoint(case.base)


def merged_lycoris(tensors: Mapping[str, torch.Tensor], base: Checkpoint) -> dict[str, torch.Tensor]:
    refs = {name: constant(tensor, name) for name, tensor in tensors.items()}
    reading = formats.read(Tensors(refs), "it", given=with_base(None, base))
    assert reading.adapter.format == "lycoris"
    binding = bind([(reading.adapter, 1.0)], base)
    return {name: Merged(binding).read(name) for name in binding.bound}


def test_lycoris_of_convolutions() -> None:
    """Convolutions flat and by Tucker, LoHa, LoKr and LoCon, against the formulas written out."""
    torch.manual_seed(4)
    base = api.open_checkpoint(BASES / "convs")
    weight = stored(BASES / "convs")["square.weight"]  # (12, 8, 3, 3)
    core, ones, twos = torch.randn(2, 2, 3, 3), torch.randn(2, 12), torch.randn(2, 8)
    other, a, b = torch.randn(2, 2, 3, 3), torch.randn(2, 12), torch.randn(2, 8)
    tucker = "ijkl,ip,jr->prkl"
    named = {"hada_t1": core, "hada_w1_a": ones, "hada_w1_b": twos, "hada_t2": other, "hada_w2_a": a, "hada_w2_b": b}
    expected = weight + 1.5 * torch.einsum(tucker, core, ones, twos) * torch.einsum(tucker, other, a, b)
    cases = [({**named, "alpha": torch.tensor(3.0)}, expected)]
    w1, w2, low, high = torch.randn(3, 2), torch.randn(4, 4, 3, 3), torch.randn(4, 2), torch.randn(2, 36)
    cases.append(({"lokr_w1": w1, "lokr_w2": w2}, weight + torch.kron(w1[:, :, None, None], w2)))
    flat = torch.kron(w1[:, :, None, None], (low @ high).reshape(4, 4, 3, 3))
    cases.append(
        ({"lokr_w1": w1, "lokr_w2_a": low, "lokr_w2_b": high, "alpha": torch.tensor(5.0)}, weight + 2.5 * flat)
    )
    small = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": torch.randn(2, 4), "lokr_w2_b": torch.randn(2, 4)}
    inner = torch.einsum(tucker, core, small["lokr_w2_a"], small["lokr_w2_b"])
    cases.append((small, weight + torch.kron(w1[:, :, None, None], inner.contiguous())))
    up, down = torch.randn(12, 2, 1, 1), torch.randn(2, 8, 1, 1)
    mixed = torch.einsum("op,pqkl,qi->oikl", up[:, :, 0, 0], core, down[:, :, 0, 0])
    parts = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    cases.append((parts, weight + 0.5 * mixed))
    whole = torch.randn(2, 8, 3, 3)
    v = weight + torch.einsum("op,pikl->oikl", up[:, :, 0, 0], whole)
    m = torch.rand(12, 1, 1, 1) + 1
    parts = {"lora_up.weight": up, "lora_down.weight": whole, "alpha": torch.tensor(0.0), "dora_scale": m}
    cases.append((parts, v * m / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)))
    for tensors, wanted in cases:
        found = merged_lycoris({f"lycoris_square.{leaf}": t for leaf, t in tensors.items()}, base)
        assert_near(found["square.weight"].reshape(wanted.shape), wanted.double(), str(list(tensors)))


def test_lycoris_refusals() -> None:
    path = "lycoris_model_layers_0_mlp_down_proj"
    tensors, base = lycoris_parts("lycoris-loha-dora")
    more = {name: ref(base, name) for name in base.tensors}
    base = Tensors({**more, "a.b.weight": constant(torch.ones(2, 2)), "a_b.weight": constant(torch.ones(2, 2))})
    with pytest.raises(InputError, match=r"_ for every dot.*--base"):
        api.read_adapter(BASES.parent / "lycoris-loha" / "lycoris.safetensors")
    for change, message in (
        ({f"{path}.hada_w1_a": None}, "no hada_w1_a: the file is incomplete"),
        ({f"{path}.hada_w1_a": torch.ones(32)}, r"has shape \[32\]; expected \[any, any\]"),
        ({f"{path}.hada_w2_a": torch.ones(31, 2)}, "must be equal"),
        ({f"{path}.hada_w1_a": torch.ones(32, 2, dtype=torch.int32)}, "holds fractions"),
        ({f"{path}.alpha": torch.tensor(torch.inf)}, "erase the adapter"),
        ({f"{path}.alpha": torch.ones(2)}, "it is one number"),
        ({f"{path}.scalar": torch.ones(())}, "scalar is not something"),
        ({f"{path}.lokr_w1": torch.ones(2, 2)}, "LoHa, LoKr and LoCon"),
        ({"lycoris_a_b.lora_up.weight": torch.ones(2, 2)}, "a.b.weight and a_b.weight"),
        ({f"{path}.dora_scale": torch.ones(32)}, "32 outputs and 48 inputs"),
        ({f"{path}.dora_scale": torch.ones(48, 1)}, "32 outputs and 48 inputs"),
        ({f"{path}x.alpha": torch.ones(())}, "no weight in the base"),
        ({f"{path}.hada_w1_a": torch.full((32, 2), torch.nan)}, "NaN or Inf"),
    ):
        wrong = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(DoraToolsError, match=message):
            merged_lycoris(wrong, base)


@pytest.mark.parametrize("name", ["lycoris-loha-dora", "lycoris-lokr-dora-in", "lycoris-lokr-full"])
def test_a_misshapen_lycoris_is_no_traceback(name: str) -> None:
    tensors, base = lycoris_parts(name)
    for key in (key for key in tensors if "layers_0_mlp" in key):
        tensor = tensors[key]
        for wrong in (
            tensor.unsqueeze(0),
            tensor.flatten(),
            tensor.flatten()[:0],
            tensor.flatten()[0],
            torch.cat([tensor.unsqueeze(0), tensor.unsqueeze(0)]).flatten(0, 1 if tensor.ndim else 0),
            tensor.int(),
            tensor.bool(),
        ):
            try:
                merged_lycoris({**tensors, key: wrong}, base)
            except DoraToolsError as error:
                assert len(str(error)) > 30
