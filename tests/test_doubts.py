"""What an attack on the formats found, one small test for each finding: nothing may be lost, folded or guessed.

Every checkpoint is made here and goes through the command line; the oracle is the layer's own formula in float64.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_tools.cli import main
from dora_tools.formats.table import updates

State = dict[str, Any]
RULE = ("--scale-rule", "alpha/rank", "--alpha", 4)  # with rank 2: a scaling of 2
ALPHA = ("--alpha", 4)


@dataclass
class Work:
    """A folder, and the command line at work in it; ``said`` is what the last command printed."""

    path: Path
    capsys: pytest.CaptureFixture[str]
    said: str = ""

    def save(self, saved: Any, name: str = "a.pt") -> Path:
        (self.path / name).parent.mkdir(exist_ok=True)
        torch.save(saved, self.path / name)
        return self.path / name

    def base(self, tensors: State, **config: Any) -> tuple[str, Path]:
        folder = self.path / "base"
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        return "--base", folder

    def adapter(self, tensors: State, folder: str = "adapter", **config: Any) -> Path:
        """A PEFT directory of rank 2 and scaling 2."""
        (self.path / folder).mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (self.path / folder / "adapter_config.json").write_text(json.dumps(config))
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, self.path / folder / "adapter_model.safetensors")
        return self.path / folder

    def two_files(self, adapter: State, beside: State, kind: str = "LORA") -> Path:
        """LLaVA's: the adapter, and what was trained beside it."""
        folder = self.adapter({}, peft_type=kind)
        (folder / "adapter_model.safetensors").unlink()
        self.save({f"base_model.model.{n}": t for n, t in adapter.items()}, "adapter/adapter_model.bin")
        self.save(beside, "adapter/non_lora_trainables.bin")
        return folder

    def table(self, text: str, name: str = "my.toml") -> Path:
        (self.path / name).write_text(text)
        return self.path / name

    def run(self, *arguments: object) -> int:
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = self.capsys.readouterr()
        self.said = " ".join(f"{printed.err} {printed.out}".split())
        return code

    def merge(self, *arguments: object) -> dict[str, torch.Tensor]:
        out = self.path / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert self.run("merge", *arguments, "-o", out) == 0, self.said
        merged: dict[str, torch.Tensor] = load_file(out / "model.safetensors")
        return merged

    def refuse(self, code: int, words: Sequence[str], *arguments: object, command: str = "merge") -> None:
        found = self.run(command, *arguments, "-o", self.path / "refused")
        assert found == code, self.said
        assert not (self.path / "refused").exists()
        for word in words:
            assert word in self.said


@pytest.fixture
def work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Work:
    torch.manual_seed(0)
    return Work(tmp_path, capsys)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found.double(), wanted.double(), atol=1e-5)


def rasbt(path: str, weight: bool = True, in_: int = 4) -> State:
    factors = {f"{path}.lora.A": r(in_, 2), f"{path}.lora.B": r(2, 6)}
    return factors | {f"{path}.linear.weight": r(6, 4)} if weight else factors


def loralib(path: str, out: int = 6, in_: int = 4) -> State:
    return {f"{path}.lora_A": r(2, in_), f"{path}.lora_B": r(out, 2)}


def peft(path: str, out: int = 6, in_: int = 4) -> State:
    return {f"{path}.lora_A.weight": r(2, in_), f"{path}.lora_B.weight": r(out, 2)}


def minlora(path: str, out: int = 6, in_: int = 4, rank: int = 2) -> State:
    at = f"{path}.parametrizations.weight"
    return {f"{at}.0.lora_A": r(rank, in_), f"{at}.0.lora_B": r(out, rank), f"{at}.original": r(out, in_)}


def catid(path: str) -> State:
    return {f"{path}.lora_A": r(6, 2), f"{path}.lora_B": r(2, 4), f"{path}.m": r(1, 4).abs(), f"{path}.weight": r(6, 4)}


def qdora(path: str) -> State:
    factors = {f"{path}.dora_layer.lora_A.weight": r(2, 4), f"{path}.dora_layer.lora_B.weight": r(6, 2)}
    return factors | {f"{path}.magnitude_layer.magnitude": r(6).abs()}


def delta(state: State, path: str) -> torch.Tensor:
    """B A of any of them, as (out, in)."""
    found: dict[str, torch.Tensor] = {n: t.double() for n, t in state.items() if n.startswith(f"{path}.")}
    if f"{path}.lora.A" in found:
        return (found[f"{path}.lora.A"] @ found[f"{path}.lora.B"]).T
    a, b = (next(t for n, t in found.items() if f"lora_{x}" in n) for x in "AB")
    return b @ a


def quantised(*shape: int) -> torch.Tensor:
    return torch.quantize_per_tensor(r(*shape), 0.1, 0, torch.qint8)


OWN = (*RULE, "--saved-in", "train")  # for a checkpoint that is its own base
OF_OUTPUTS = ("--magnitude-axis", "out")


def stacked(path: str) -> State:
    return minlora(path) | {name.replace("t.0", "t.1"): r(*t.shape) for name, t in minlora(path).items()}


def trained(**settings: Any) -> State:
    return {"state_dict": loralib("x"), "hyper_parameters": settings}


# fmt: off
REFUSED: list[Any] = [  # exit code, words of the message, checkpoint, options
    # 1.2 keys that no rule knows
    (3, ["x.parametrizations.weight.1.lora_A"], lambda: stacked("x"), OWN),
    (3, ["x.lora_magnitude"], lambda: loralib("x") | {"x.weight": r(6, 4), "x.lora_magnitude": r(6)}, OWN),
    (3, ["b.lora_A.weight"], lambda: qdora("x") | peft("b") | {"x.base_layer.weight": r(6, 4), "b.bias": r(6)}, OWN),
    (3, ["a.lora.A"], lambda: rasbt("a") | loralib("b") | {"b.weight": r(6, 4)}, OWN),
    pytest.param(3, ["a.lora.A"], lambda: rasbt("a") | peft("b") | {"b.weight": r(6, 4)}, OWN),
    # 1.3 adapters beside the network
    (3, ["module.y.lora.A", "looks like a part"], lambda: {"model": rasbt("x"), "module": rasbt("y")}, OWN),
    pytest.param(3, ["critic_state.y"], lambda: {"model": rasbt("x"), "critic_state": rasbt("y")}, OWN),
    pytest.param(3, ["lora_params.y"], lambda: {"model": rasbt("x"), "lora_params": rasbt("y")}, OWN),
    pytest.param(3, ["example.y"], lambda: {"model": rasbt("x"), "example": rasbt("y")}, OWN),
    # 1.6 two keys that become one name
    (3, ["x.weight"], lambda: rasbt("x") | {"x.weight": r(6, 4)}, OWN),
    (3, ["x.bias"], lambda: rasbt("x", weight=False) | {"x.linear.bias": r(6), "x.bias": r(6)}, RULE),
    (3, ["x._orig_mod.lora_A and x.lora_A"], lambda: loralib("x") | loralib("x._orig_mod"), RULE),
    # 1.8 a magnitude for each output
    (3, ["LinearWithDoRA, which normalises"], lambda: rasbt("x", False, 6) | {"x.m": r(1, 6)}, (*OWN, *OF_OUTPUTS)),
    # 1.11 alphas that contradict each other
    (3, ["alpha is 0.2", "lora_alpha is 16", "--alpha"], lambda: trained(alpha=0.2, lora_alpha=16), ()),
    (3, ["is 0.3", "is 16", "--alpha"], lambda: trained(mixup={"r": 1, "alpha": 0.3}, lora={"alpha": 16}), ()),
    (3, ["is 8", "is 16", "--alpha"], lambda: trained(lora_alpha=8, peft_config={"lora_alpha": 16}), ()),
    pytest.param(3, ["use_rslora"], lambda: trained(alpha=8, use_rslora=False, peft={"use_rslora": True}), ()),
    # 1.13 and 4 options that mean nothing
    *[(2, ["'catid' has no alpha"], lambda: catid("x"), options) for options in (ALPHA, RULE[:2])],
    (2, ["'nowhere'"], lambda: loralib("x"), (*ALPHA, "--enable-lora", "nowhere=true,false")),
    *[(2, ["--alpha"], lambda: loralib("x"), ("--alpha", n)) for n in ("nan", "inf", "0", "-4", "1e-400")],
    *[(2, ["--scaling"], lambda: loralib("x"), ("--scaling", n)) for n in ("nan", "inf", "0", "1e300")],
    # 1.14 a magnitude whose factors are gone
    (3, ["y has y.m", "no lora_A"], lambda: catid("x") | {n: t for n, t in catid("y").items() if "lora" not in n}, OWN),
]
# fmt: on


@pytest.mark.parametrize(("code", "words", "saved", "options"), REFUSED)
def test_refused_as_soon_as_it_is_read(work: Work, code: int, words: list[str], saved: Any, options: Any) -> None:
    base = () if "--saved-in" in options else work.base({"x.weight": r(6, 4), "x.bias": r(6)})
    work.refuse(code, words, work.save(saved()), *base, *options)


# 1.1 two networks and one base
@pytest.mark.parametrize("two", ["student teacher", "generator critic", "text_model vision_model"])
@pytest.mark.parametrize("layer", [rasbt, loralib, peft])
def test_two_adapted_networks_are_not_folded_onto_one_base(work: Work, two: str, layer: Any) -> None:
    one, other = two.split()
    state, tensors = layer(f"{one}.layers.0") | layer(f"{other}.layers.1"), State()
    for path, name in ((f"{one}.layers.0", "layers.0.weight"), (f"{other}.layers.1", "layers.1.weight")):
        tensors[name] = state.get(f"{path}.linear.weight", r(6, 4))
    adapter = work.adapter(state) if layer is peft else work.save({"state_dict": state}, "run.ckpt")
    base = work.base(tensors)
    work.refuse(4, ["fit the base in two ways", f"'{one}.…'", f"'{other}.…'", "--prefix"], adapter, *base, *RULE)
    merged = work.merge(adapter, *base, *RULE, "--prefix", other)
    close(merged["layers.1.weight"], tensors["layers.1.weight"] + 2 * delta(state, f"{other}.layers.1"))
    close(merged["layers.0.weight"], tensors["layers.0.weight"])
    assert f"left out {one}.layers.0" in work.said


@pytest.mark.parametrize("second", [{"teacher.layers.0.weight": (6, 4)}, {"critic.layers.2.weight": (6, 4)}])
def test_plain_weights_of_a_second_network_are_left_out_and_said(work: Work, second: dict[str, Any]) -> None:
    state = rasbt("student.layers.0") | {name: r(*shape) for name, shape in second.items()}
    tensors = {"layers.0.weight": state["student.layers.0.linear.weight"], "layers.2.weight": r(6, 4)}
    merged = work.merge(work.save({"state_dict": state}, "run.ckpt"), *work.base(tensors), *RULE)
    close(merged["layers.0.weight"], tensors["layers.0.weight"] + 2 * delta(state, "student.layers.0"))
    close(merged["layers.2.weight"], tensors["layers.2.weight"])
    assert f"left out {next(iter(second))}" in work.said


# 1.3
@pytest.mark.parametrize("weight", [r, pytest.param(lambda *s: quantised(*s))])
def test_tensors_beside_the_network_are_left_out_and_said(work: Work, weight: Any) -> None:
    network = rasbt("layers.0")
    merged = work.merge(work.save({"model": network, "head": {"weight": weight(3, 6)}}), *RULE)
    close(merged["layers.0.weight"], network["layers.0.linear.weight"] + 2 * delta(network, "layers.0"))
    assert "left out head.weight" in work.said


# 1.4 names of a whole language model
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_trained_head_beside_the_model_is_kept(work: Work, wrapped: bool) -> None:
    state = rasbt("model.layers.0.q") | {"lm_head.weight": r(9, 4), "model.norm.weight": r(4)}
    path = work.save({"model": state} if wrapped else state)
    merged = work.merge(path, *RULE)
    assert merged.keys() == {"model.layers.0.q.weight", "lm_head.weight", "model.norm.weight"}
    wanted = state["model.layers.0.q.linear.weight"] + 2 * delta(state, "model.layers.0.q")
    own = {"model.layers.0.q.weight": state["model.layers.0.q.linear.weight"], "model.norm.weight": r(4)}
    base = work.base(own | {"lm_head.weight": r(9, 4)}, model_type="x", tie_word_embeddings=False)
    for tensors in (merged, work.merge(path, *base, *RULE)):
        close(tensors["model.layers.0.q.weight"], wanted)
        close(tensors["lm_head.weight"], state["lm_head.weight"])
        close(tensors["model.norm.weight"], state["model.norm.weight"])


# 1.5 what cannot be read in one of two files
@pytest.mark.parametrize("first", [True, False])
def test_a_quantised_entry_of_two_joined_files_is_refused(work: Work, first: bool) -> None:
    bad = {"k.weight": quantised(2, 4)}
    path = work.two_files(peft("x") | (bad if first else {}), {"mm.weight": r(3, 3)} | ({} if first else bad))
    work.refuse(3, ["k.weight", "not plain tensors"], path, *work.base({"x.weight": r(6, 4), "mm.weight": r(3, 3)}))


@pytest.mark.parametrize("absent", [True, False])
def test_a_shard_without_a_plain_tensor_is_refused(work: Work, absent: bool) -> None:
    work.save({"x.weight": r(6, 4)} | ({} if absent else {"z": quantised(2, 2)}), "bin/pytorch_model-1.bin")
    work.save({"norm": r(2)}, "bin/pytorch_model-2.bin")
    places = {"x.weight": "pytorch_model-1.bin", "z": "pytorch_model-1.bin", "norm": "pytorch_model-2.bin"}
    (work.path / "bin/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    said = "lists 1 tensors that no shard holds (first: z)" if absent else "1 entries are not plain tensors (first: z"
    work.refuse(3, [said], work.adapter(peft("x")), "--base", work.path / "bin")


A_AND_B = r"""
[[key]]
match = '(?P<module>.+)\.A'
role = "lora_A"
dims = ["rank", "in"]
[[key]]
match = '(?P<module>.+)\.B'
role = "lora_B"
dims = ["out", "rank"]
"""
ONE = A_AND_B + "[scaling]\nrule = 'one'\n"


def ab(path: str = "x", out: int = 6) -> State:
    return {f"{path}.A": r(2, 4), f"{path}.B": r(out, 2)}


def test_two_keys_that_a_table_renames_to_one_are_refused(work: Work) -> None:
    table = work.table("[[rename]]\nmatch = '^(a|b)\\.'\nto = ''\n" + ONE)
    path = work.save(ab("a.x") | {"a.n.weight": r(3), "b.n.weight": r(3)})
    base = work.base({"x.weight": r(6, 4), "n.weight": r(3)})
    work.refuse(3, ["a.n.weight and b.n.weight are both n.weight"], path, *base, "--custom", table)


def test_a_tensor_under_two_names_in_llava_s_two_files_is_refused(work: Work) -> None:
    state = peft("x") | {"x.weight_m_wdecomp.weight": r(6, 1).abs(), "mm.weight": r(3, 3)}
    path, base = work.two_files(state, {"mm.weight": r(3, 3)}, "DORA"), work.base({"x.weight": r(6, 4)})
    work.refuse(3, ["base_model.model.mm.weight and mm.weight are both"], path, *base)


# 1.7 square layers
@pytest.mark.parametrize("layer", ["loralib", "minlora"])
def test_a_square_layer_without_evidence_is_asked_about(work: Work, layer: str) -> None:
    own = loralib("x", 4, 4) | {"x.weight": r(4, 4)} if layer == "loralib" else minlora("x", 4, 4, 4)
    weight, adapter = list(own.values())[-1], work.save(dict(list(own.items())[:-1]), "adapter.pt")
    a, b = (next(t for n, t in own.items() if n.endswith(f"lora_{x}")).double() for x in "AB")
    embedding = a @ b if layer == "minlora" else (b @ a).T  # as loralib's linear layers with fan_in_fan_out
    changes = {"--no-fan-in-fan-out": b @ a, "--fan-in-fan-out": embedding}
    for path in (work.save(own), adapter):
        base = work.base({"x.weight": weight}) if path == adapter else OWN[-2:]
        work.refuse(3, ["x is square", *changes], path, *base, "--scaling", 2)
        for option, change in changes.items():
            close(work.merge(path, *base, "--scaling", 2, option)["x.weight"], weight + 2 * change)


@pytest.mark.parametrize(
    ("path", "model_type", "turned"),
    [
        ("transformer.h.0.attn.c_proj", "gpt2", True),
        ("model.layers.0.q_proj", "llama", False),
        pytest.param("transformer.wpe", "gpt2", True),
        pytest.param("embeddings.position_embeddings", "bert", True),
    ],
)
def test_a_model_type_tells_how_square_weights_are_stored(work: Work, path: str, model_type: str, turned: bool) -> None:
    state, weight = loralib(path, 6, 6), r(6, 6)
    base = work.base({f"{path}.weight": weight}, model_type=model_type, architectures=["X"], vocab_size=30)
    merged = work.merge(work.save(state), *base, *ALPHA)
    close(merged[f"{path}.weight"], weight + 2 * (delta(state, path).T if turned else delta(state, path)))


@pytest.mark.parametrize("turned", [True, False])
def test_the_other_layers_tell_how_square_weights_are_stored(work: Work, turned: bool) -> None:
    state = loralib("a", 8, 6) | loralib("x", 6, 6)
    tensors = {"a.weight": r(6, 8) if turned else r(8, 6), "a.bias": r(8), "x.weight": r(6, 6), "x.bias": r(6)}
    merged = work.merge(work.save(state | tensors), *ALPHA, "--saved-in", "train")
    assert f"x is square; it is taken to be stored {'(in, out)' if turned else '(out, in)'}" in work.said
    for name in "ax":
        change = 2 * delta(state, name)
        close(merged[f"{name}.weight"], tensors[f"{name}.weight"] + (change.T if turned else change))


def test_a_table_tells_how_square_weights_are_stored(work: Work) -> None:
    base = "[[key]]\nmatch = '(?P<module>.+)\\.kernel'\nrole = 'base'\ndims = ['in', 'out']\n[scaling]\nrule = 'one'\n"
    state = {"x.A": r(2, 6), "x.B": r(6, 2), "x.kernel": r(6, 6)}
    merged = work.merge(work.save(state), "--custom", work.table(A_AND_B + base))
    close(merged["x.weight"], state["x.kernel"] + (state["x.B"].double() @ state["x.A"].double()).T)


def scaled(state: State, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """QDoRA's weight, and the factor that its bias gets too."""
    v = weight.double() + delta({n: t for n, t in state.items() if "lora" in n}, "x")
    factor = state["x.magnitude_layer.magnitude"].double() / v.norm(dim=1)
    return factor[:, None] * v, factor


# 1.9
@pytest.mark.parametrize("strength", [1, 0.5])
@pytest.mark.parametrize("moved", [True, False])
def test_a_scaled_bias_goes_the_whole_way_or_was_not_trained(work: Work, strength: float, moved: bool) -> None:
    weight, bias, state = r(6, 4), r(6), qdora("x")
    saved = r(6) if moved else bias
    path = work.save(state | {"x.base_layer.weight": weight, "x.base_layer.bias": saved})
    arguments = (path, *work.base({"x.weight": weight, "x.bias": bias}), "--strength", strength)
    if moved and strength != 1:
        work.refuse(4, ["x.bias", "a strength of 0.5"], *arguments)
        return
    merged, (whole, factor) = work.merge(*arguments), scaled(state, weight)
    close(merged["x.weight"], weight + strength * (whole - weight))
    close(merged["x.bias"], bias + strength * (factor * saved - bias))


def test_a_scaled_bias_of_a_base_that_is_stored_the_other_way_round(work: Work) -> None:
    weight, bias, state = r(6, 4), r(6), qdora("x")
    merged = work.merge(work.save(state), *work.base({"x.weight": weight.T, "x.bias": bias}))
    whole, factor = scaled(state, weight)
    close(merged["x.weight"], whole.T)
    close(merged["x.bias"], factor * bias)


# 1.10
@pytest.mark.parametrize("turned_round", [False, True])
@pytest.mark.parametrize("name", ["z.weight", "x.bias"])
def test_what_one_adapter_replaces_no_other_may_update(work: Work, name: str, turned_round: bool) -> None:
    tensors = {"q.weight": r(6, 4), "z.weight": r(6, 4), "x.weight": r(6, 4), "x.bias": r(6)}
    whole = work.adapter(peft("q") | {name: r(*tensors[name].shape)}, modules_to_save=["z"])
    other = work.save(qdora("x")) if name == "x.bias" else work.adapter(peft("z"), "other")
    order, base = [other, whole], work.base(tensors, model_type="t", tie_word_embeddings=False)
    words = [f"{name} is saved whole by one of the adapters and changed by another"]
    work.refuse(4, words, *(order if turned_round else order[::-1]), *base)


# 1.11
def test_a_pickled_module_s_scaling_is_used(work: Work) -> None:
    network, layer, lora = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    network.x, layer.lora, layer.linear = layer, lora, torch.nn.Linear(4, 6)
    lora.A, lora.B = torch.nn.Parameter(r(4, 2)), torch.nn.Parameter(r(2, 6))
    lora.__dict__ |= {"alpha": 4, "scaling": 3.0}
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    close(work.merge(work.save(network))["x.weight"], state["x.linear.weight"] + 3 * delta(state, "x"))


# 1.12 tables that are written
A = 'role = "lora_A"'
LITERAL = A_AND_B + "[scaling]\nrule = 'alpha/rank'\nalpha = ['literal:16']\n"
UNWRITABLE: list[Any] = [
    *[(3, ["{module}"], ONE.replace(A, f"{A}\nwrite = {key}")) for key in ("'A'", "3", "''", "[]")],
    (5, ["x.w"], ONE.replace('role = "lora', 'write = "{module}.w"\nrole = "lora')),
    (5, ["reads the same name back"], "[[rename]]\nmatch = '^'\nto = 'model.'\n" + ONE),
    pytest.param(5, ["enc.n"], "[[rename]]\nmatch = '^enc\\.'\nto = ''\n" + ONE),
    pytest.param(5, ["enc.n"], "[[key]]\nmatch = 'enc.+'\nrole = 'ignore'\nreason = 'of no use'\n" + ONE),
    pytest.param(5, ["x"], ONE.replace(A, f'{A}\nwrite = "{{module}}.up"')),
    pytest.param(3, ["literal"], LITERAL.replace("16", "0")),
    pytest.param(3, ["literal"], LITERAL.replace("16", "nan")),
    pytest.param(3, ["literal"], LITERAL.replace("16", "1e999")),
]


@pytest.mark.parametrize(("code", "words", "table"), UNWRITABLE)
def test_what_would_not_read_back_is_not_written(work: Work, code: int, words: list[str], table: str) -> None:
    adapter = work.adapter(peft("x") | {"enc.n.weight": r(3)})
    work.refuse(code, words, adapter, "--to", work.table(table), command="convert")


def test_a_table_s_own_alpha_is_counted_when_writing(work: Work) -> None:
    state, weight, table = peft("x"), r(6, 4), work.table(LITERAL)
    assert work.run("convert", work.adapter(state), "--to", table, "-o", work.path / "c") == 0
    merged = work.merge(work.path / "c", *work.base({"x.weight": weight}), "--custom", table)
    close(merged["x.weight"], weight + 2 * delta(state, "x"))


DORA = ONE + "[[key]]\nmatch = '(?P<module>.+)\\.m'\nrole = 'magnitude'\ndims = ['out']\n[dora]\nrequired = true\n"


def test_another_rule_for_eps_is_another_format(work: Work) -> None:
    add, clamp = work.table(DORA + "eps = 0.5\n", "add.toml"), work.table(DORA + "eps = 0.5\neps_rule = 'clamp'\n")
    path, weight = work.save(ab() | {"x.m": r(6).abs()}), r(6, 4)
    work.refuse(5, ["'add' does not hold"], path, "--from", clamp, "--to", add, command="convert")
    merged = {t: work.merge(path, *work.base({"x.weight": weight}), "--custom", t)["x.weight"] for t in (add, clamp)}
    assert not torch.allclose(merged[add], merged[clamp])


# 1.13 and 4 options
def test_an_alpha_beside_peft_s_config_is_used_and_said(work: Work) -> None:
    state, weight = peft("x"), r(6, 4)
    merged = work.merge(work.adapter(state), *work.base({"x.weight": weight}), "--alpha", 64)
    close(merged["x.weight"], weight + 32 * delta(state, "x"))
    assert "The scaling is the one asked for, not that of adapter_config.json" in work.said


@pytest.mark.parametrize("order", [1, -1])
def test_the_longer_end_of_a_module_s_path_wins(work: Work, order: int) -> None:
    a, b, weight = r(4, 4), r(4, 2), r(6, 4)
    path = work.save({"h.0.c_attn.lora_A": a, "h.0.c_attn.lora_B": b})
    first, second = [("--enable-lora", "c_attn=1,1,0"), ("--enable-lora", "h.0.c_attn=1,0,1")][::order]
    merged = work.merge(path, *work.base({"h.0.c_attn.weight": weight}), *ALPHA, *first, *second)
    q, v = (2 * b[i : i + 2].double() @ a[i : i + 2].double() for i in (0, 2))
    close(merged["h.0.c_attn.weight"], weight + torch.cat([q, torch.zeros(2, 4), v]))


@pytest.mark.parametrize("before", ["", "model.", "model.base_model.model."])
def test_peft_s_keys_in_a_training_checkpoint(work: Work, before: str) -> None:
    state, weight = peft("x"), r(6, 4)
    path = work.save({"state_dict": {before + name: tensor for name, tensor in state.items()}}, "run.ckpt")
    close(work.merge(path, *work.base({"x.weight": weight}), *RULE)["x.weight"], weight + 2 * delta(state, "x"))


@pytest.mark.parametrize("bias", [{"enc.x.bias": 6}, {"enc.x.bias": 6, "dec.x.bias": 6}])
def test_names_that_stand_in_the_base_as_they_are_win(work: Work, bias: dict[str, int]) -> None:
    state, weight = loralib("x"), r(6, 4)
    others = {name.replace("bias", "weight"): r(6, 7) for name in bias} | {name: r(n) for name, n in bias.items()}
    merged = work.merge(work.save(state), *work.base({"x.weight": weight} | others), *ALPHA)
    close(merged["x.weight"], weight + 2 * delta(state, "x"))


# 1.14
@pytest.mark.parametrize("rows", ["['4', '0-2', '4']", "['8', '0']", "['6']"])
def test_parts_of_a_fused_layer_have_rows(work: Work, rows: str) -> None:
    enabled = "enabled = [true, false, true]\n" if rows.count(",") == 2 else ""
    table = work.table(ONE + f"[[fused]]\nmatch = 'x'\nrows = {rows}\n{enabled}")
    work.refuse(3, ["do not give the 8 rows"], work.save(ab(out=8)), *work.base({"x.weight": r(6, 4)}), "--from", table)


def test_naming_the_adapter_s_file_takes_what_was_trained_beside_it(work: Work) -> None:
    state, weight, mm = peft("x"), r(6, 4), r(3, 3)
    path = work.two_files(state, {"mm.weight": mm}) / "adapter_model.bin"
    merged = work.merge(path, *work.base({"x.weight": weight, "mm.weight": r(3, 3)}))
    close(merged["x.weight"], weight + 2 * delta(state, "x"))
    close(merged["mm.weight"], mm)


# 2 inputs that cost time or memory
@pytest.mark.timeout(20)
@pytest.mark.parametrize("cyclic", [False, True])
def test_shared_and_cyclic_settings_take_no_time(work: Work, cyclic: bool) -> None:
    tower: State = {"lora_alpha": 4}
    for _ in range(18):
        tower = {f"k{i}": tower for i in range(4)} | {"list": [tower] * 4, "r": 1, "config": tower}
    if cyclic:
        tower["config"]["model"] = tower
    assert work.run("inspect", work.save(trained(lora_alpha=4, model=tower), "run.ckpt")) == 0
    assert "2 = 4/2" in work.said


@pytest.mark.timeout(20)
def test_a_huge_kernel_is_refused_before_anything_is_made(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "assembled", None)
    state = {"c.lora_A": r(200, 200), "c.lora_B": r(200, 200), "c.conv.weight": r(1, 1, 200, 200)}
    work.refuse(3, ["a kernel of side 200"], work.save(state), *OWN)


FOREVER = ["(a+)+b", "(a|a)*b", "(?:a{1,9}){1,9}b", "((a*)|(b))+c", "((a+)(b?))+c", "a*" * 9]
ACCEPTED = [pytest.param(p) for p in ("((a+)b?)+c", "(([a])+)+c")]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", [*FOREVER, *ACCEPTED])
def test_patterns_that_may_take_forever_are_refused(work: Work, pattern: str) -> None:
    table = work.table(f"[[key]]\nmatch = '{pattern}'\nrole = 'ignore'\n" + ONE)
    assert work.run("formats", table) == 3
    assert "may take forever" in work.said


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["hyper_parameters z", "hyper_parameters lora_alpha", "callbacks z", "state_dict z"])
@pytest.mark.parametrize("how", ["system", "eval", "open", "nested"])
def test_nothing_in_a_checkpoint_is_run(work: Work, how: str, where: str) -> None:
    canary, system = work.path / "canary", Call(getattr, Call(__import__, "os"), "system")
    evil = {
        "system": Call(os.system, f"touch {canary}"),
        "eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "open": Call(builtins.open, str(canary), "w"),
        "nested": Call(list, Call(map, system, [f"touch {canary}"])),
    }[how]
    saved, (place, key) = trained(lora_alpha=4) | {"callbacks": {}}, where.split()
    saved["state_dict"]["x.weight"] = r(6, 4)
    saved[place][key] = evil
    path = work.save(saved, "run.ckpt")
    assert work.run("inspect", path) in (0, 3)
    assert work.run("merge", path, "--saved-in", "train", "-o", work.path / "out") in (0, 3)
    assert not canary.exists()


# 3 values of the wrong kind: an input that is refused, never a bug
TESTED = A_AND_B + "[scaling]\nrule = 'alpha/rank'\n[test]\nalpha = 4\n"
TESTED += """
tensors = { "x.A" = [[1, 2], [0, 1]], "x.B" = [[1, 0], [0, 3]] }
base = { "x.weight" = [[1, 1], [1, 1]] }
merged = { "x.weight" = [[3, 5], [1, 7]] }
"""
BAD: list[tuple[str, str]] = [
    *[("\n[[key]]", f"\n{s} = {v}\n[[key]]") for s in ("layout", "fused", "refuse") for v in ("3", "[1]", "[[]]")],
    *[("[scaling]", f"[dora]\neps = {v}\n[scaling]") for v in ("nan", "inf", "-0.5", '"x"', "9" * 400, "9" * 5000)],
    *[("[scaling]", f"[dora]\n{v}\n[scaling]") for v in ("eps_rule = []", "bias = {}", "required = 3", "oops = 1")],
    *[("[scaling]", f"[[rename]]\nmatch = 'x'\nto = {v}\n[scaling]") for v in ("3", r"'\9'", r"'\g<no>'", "[]")],
    *[("[scaling]", f"[[fused]]\nmatch = 'x'\n{v}\n[scaling]") for v in ("into = ['q', 'q']", "rows = ['9**9']", "")],
    *[
        ("\n[[key]]", f"\nfile = {v}\n[[key]]")
        for v in ("'../x.safetensors'", "'/x.safetensors'", "'x'", "3", r'"\u0000"')
    ],
    *[("\n[[key]]", f"\n{v}\n[[key]]") for v in ("unmatched = []", "merges_on_eval = 3", "x = " + "[" * 5000)],
    *[("rule = 'alpha/rank'", v) for v in ("rule = 3", "rule = [[]]", "alpha = ['literal:x']", "alpha = 3")],
    *[('dims = ["rank", "in"]', v) for v in ("dims = 3", "dims = [[]]", "dims = ['width']")],
    *[("alpha = 4", f"alpha = {v}") for v in ('"x"', "[1]", "nan", "inf", "0", "{}", "9" * 400)],
    *[("alpha = 4", f"alpha = 4\n{v}") for v in ("scaling = 1", "enable_lora = 3", "hparams = []", "config = 3")],
    *[("[[3, 5], [1, 7]]", v) for v in ("[[inf, 5], [1, 7]]", "[[3], [1, 7]]", "'x'", "{}", "[['a']]", "[[1, 1]]")],
    *[("[[1, 2], [0, 1]]", v) for v in ("[[nan, 2], [0, 1]]", "[]", "1979-05-27", "[" * 99 + "]" * 99, "9" * 400)],
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("change", BAD, ids=lambda change: repr(change[1])[:40])
def test_values_of_the_wrong_kind_in_a_table(work: Work, change: tuple[str, str]) -> None:
    assert work.run("formats", work.table(TESTED)) == 0
    assert work.run("formats", work.table(TESTED.replace(*change, 1))) == 3
    assert "my.toml" in work.said


@pytest.mark.parametrize("alpha", [10**400, 10**5000, float("nan"), float("inf"), True, "16", None, [16], 0], ids=type)
def test_settings_that_are_no_alpha(work: Work, alpha: Any) -> None:
    assert work.run("inspect", work.save(trained(lora_alpha=alpha, r=alpha), "run.ckpt")) == 3
    assert "alpha" in work.said
