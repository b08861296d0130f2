"""What an attack on PEFT's LoRA found, and what it did not: refusals, merges, writing and operations on odd kinds.

The oracles are the trained models' own logits, PEFT, and the formulas in float64.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import dora_tools
from dora_tools.cli import main

from . import gguf_models
from .gguf_models import by_hand, merged_by_hand
from .peft_cases import BASES, SAID, Case, network, of_peft, outputs

Floats = NDArray[np.float64]
Weights = dict[str, Floats]
State = dict[str, torch.Tensor]
CLOSE, MODEL = 1e-5, "base_model.model."
Q = "model.layers.0.self_attn.q_proj."
EXPERTS = "model.layers.0.mlp.experts."
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


@dataclass
class Work:
    """A folder, and the command line at work in it; ``said`` is what the last command printed."""

    path: Path
    capsys: pytest.CaptureFixture[str]
    said: str = ""
    printed: str = ""

    def run(self, *arguments: object) -> int:
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        found = self.capsys.readouterr()
        self.said, self.printed = " ".join(found.err.split()), found.out
        return code

    def do(self, *arguments: object, out: str = "out") -> Path:
        shutil.rmtree(self.path / out, ignore_errors=True)
        assert self.run(*arguments, "-o", self.path / out) == 0, self.said
        return self.path / out

    def merge(self, *arguments: object, out: str = "out") -> State:
        return tensors(self.do("merge", *arguments, out=out))

    def refuse(self, *arguments: object, words: Sequence[str] = (), codes: Sequence[int] = (3, 4, 5)) -> None:
        out, began = self.path / "refused", time.monotonic()
        code = self.run(*arguments, *([] if arguments[0] == "inspect" else ["-o", out]))
        assert code in codes, (code, self.said)
        assert time.monotonic() - began < 2, "it took long"
        assert not out.exists(), "something was left behind"
        assert self.said.startswith("Error: ") and self.said.endswith((".", "?", "…")), self.said
        assert not re.search("Traceback|Unexpected|is a bug", self.said) and len(self.said) < 5000, self.said
        for word in words:
            assert word in self.said, self.said

    def changed(self, case: Case, state: Mapping[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
        """A case's adapter with some tensors and settings changed (None: a tensor that is left out)."""
        folder = self.path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        changes = {MODEL + name: tensor for name, tensor in (state or {}).items()}
        every = {**load_file(case.path / "adapter_model.safetensors"), **changes}
        kept = {name: tensor.contiguous() for name, tensor in every.items() if tensor is not None}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({**case.config, **config}))
        return folder

    def base(self, state: Mapping[str, torch.Tensor], like: Path, **config: Any) -> Path:
        """A base with these tensors and the config of another."""
        folder = self.path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
        settings = {**json.loads((like / "config.json").read_text()), **config}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder


@pytest.fixture
def work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Work:
    torch.manual_seed(0)
    return Work(tmp_path, capsys)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def tensors(folder: Path) -> State:
    found: State = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def floats(folder: Path) -> Weights:
    return {name: tensor.double().numpy() for name, tensor in tensors(folder).items()}


def options(case: Case) -> list[str]:
    """What the user has to say of a case, on the command line."""
    said = [[f"--{name.replace('_', '-')}", *([] if v is True else [v])] for name, v in SAID.get(case.name, {}).items()]
    if not said and (case.path / "initial").exists():
        said = [["--initial-adapter", str(case.path / "initial")]]
    return [word for words in said for word in words]


def same(found: Mapping[str, torch.Tensor], want: Mapping[str, Any], bar: float = CLOSE) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(found[name].double(), np.asarray(tensor, np.float64), atol=bar, err_msg=name)


def between(base: Mapping[str, Any], merged: Mapping[str, Any], strength: float) -> Weights:
    """W + w (W' − W)."""
    every = {name: np.asarray(base[name], np.float64) for name in merged}
    return {n: w + strength * (np.asarray(merged[n], np.float64) - w) for n, w in every.items()}


def trained(case: Case, merged: Path) -> None:
    """The model in a folder computes what the trained one did."""
    found = outputs(network(merged), case.inputs)
    assert np.abs(found - case.expected).max() < CLOSE


# --- 1: refusals -----------------------------------------------------------------------------------------------------

NAMED = {
    "alora": ("alora_invocation_tokens",),
    "xlora": ("XLORA",),
    "poly": ("POLY",),
    "prompt-tuning": ("PROMPT_TUNING", "changes no weight"),
    "prefix-tuning": ("PREFIX_TUNING", "changes no weight"),
    "grouped-conv": ("grouped convolution",),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_no_merge_can_do_is_refused_by_name(name: str, work: Work) -> None:
    case = Case(name)
    for command in ("merge", "convert", "inspect"):
        more = {"merge": ["--base", case.base], "convert": ["--to", "peft"], "inspect": []}[command]
        work.refuse(command, case.path, *more, words=NAMED[name], codes=[3])


def test_arrow_and_its_parts(work: Work) -> None:
    case = Case("arrow")
    work.refuse("merge", case.path, "--base", case.base, words=["several adapters", "task_0"], codes=[3])
    work.refuse("merge", case.path / "arrow_router", "--base", case.base, words=["arrow_config"], codes=[3])
    work.merge(case.path / "task_0", "--base", case.base)  # an expert of it is a plain LoRA


BOTH = ("--residual-base", "--initial-adapter")


@pytest.mark.parametrize("name", ["corda", "lora-ga", "loftq", "pissa-niter"])
def test_starts_that_cannot_be_computed_again(name: str, work: Work) -> None:
    case = Case(name)
    pristine = BASES / case.facts["base"]
    work.refuse("merge", case.path, "--base", pristine, words=BOTH[: 1 if name == "loftq" else 2], codes=[3])
    assert ("--initial-adapter" in work.said) is (name != "loftq")
    if name != "loftq":
        folder = work.do("merge", case.path, "--base", pristine, "--initial-adapter", case.path / "initial")
        trained(case, folder)
    trained(case, work.do("merge", case.path, "--base", BASES / case.facts["residual_base"], "--residual-base"))


def test_an_initial_adapter_of_another_kind(work: Work) -> None:
    case = Case("corda")
    began = Case("corda/initial")
    base = ["--base", BASES / case.facts["base"]]
    name = next(key for key in load_file(began.path / "adapter_model.safetensors") if key.endswith("lora_A.weight"))
    name = name.removeprefix(MODEL)
    module = name.removesuffix("lora_A.weight")
    a = load_file(began.path / "adapter_model.safetensors")[MODEL + name]
    missing = {name: None, module + "lora_B.weight": None}
    wide = {name: torch.zeros(a.shape[0], a.shape[1] + 1)}
    alpha = began.config["lora_alpha"]
    for state, config, word in (
        (missing, {}, "no factors of"),
        (wide, {}, "another shape"),
        ({}, {"lora_alpha": alpha + 1}, "scaling"),
    ):
        first = work.changed(began, state, **config)
        work.refuse("merge", case.path, *base, "--initial-adapter", first, words=[word], codes=[4])
    work.refuse("merge", case.path, *base, "--initial-adapter", Case("loha").path)
    work.refuse("merge", case.path, *base, "--initial-adapter", Case("dora").path)


@pytest.mark.parametrize(
    "name", ["moe-gpt-oss-square-down", "moe-gpt-oss-square-down-peft-0-19-0", "moe-v4-gpt-oss-square-down"]
)
def test_square_experts_of_which_nothing_tells_the_axis(name: str, work: Work) -> None:
    case = Case(name)
    work.refuse("merge", case.path, "--base", case.base, words=["square", "--expert-lora-a"], codes=[3])


def test_unsloth_s_order_is_said_or_asked_for(work: Work) -> None:
    case = Case("moe-unsloth-ambiguous")
    work.refuse("merge", case.path, "--base", case.base, words=["Unsloth", "--lora-b-layout"], codes=[3])
    for layout in ("mixed", "", [], {}, 5):
        work.refuse("merge", work.changed(case, lora_B_layout=layout), "--base", case.base, codes=[3])
    detail = {"parameters": {"down_proj": {"lora_B_layout": "mixed"}}}
    work.refuse("merge", work.changed(case, unsloth_fused_expert_lora=detail), "--base", case.base, codes=[3])


def test_bases_of_another_kind(work: Work) -> None:
    for name, other in (("dora", "llama"), ("moe-qwen3", "mixtral"), ("mha", "convs"), ("token-rows", "gpt2")):
        work.refuse("merge", Case(name).path, "--base", BASES / other, codes=[4])
    case = Case("moe-qwen3")
    state = tensors(case.base)
    fewer = {name: tensor for name, tensor in state.items() if ".experts.2." not in name}
    work.refuse("merge", case.path, "--base", work.base(fewer, case.base, num_experts=2), codes=[4])
    more = {n.replace(".experts.2.", ".experts.3."): t for n, t in state.items() if ".experts.2." in n}
    more |= {n.replace(".experts.2.", ".experts.4."): t.clone() for n, t in state.items() if ".experts.2." in n}
    work.refuse("merge", case.path, "--base", work.base({**state, **more}, case.base, num_experts=5), codes=[4])
    gone = {name: tensor for name, tensor in state.items() if ".experts.1.up_proj" not in name}
    work.refuse("merge", case.path, "--base", work.base(gone, case.base), words=["only some"], codes=[4])


@pytest.mark.parametrize("ranges", [[[0, 3]], [[0, 10**9]], [[0, 2], [10**8, 10**8 + 1]]])
def test_layers_beyond_the_base(ranges: Any, work: Work) -> None:
    case = Case("layer-replication")
    if ranges[0][1] == 10**9:
        pytest.xfail("every layer of the range is counted out first: 23 GB")
    work.refuse("merge", work.changed(case, layer_replication=ranges), "--base", case.base, codes=[4])


TOKENS: list[Any] = [
    (None, 3),
    ([], 3),
    ([25, 10], 3),
    ([25, 10, 28, 29], 3),
    ([25, 10, 10], 3),
    ([25, 10, -1], 3),
    ([25, 10, 2.5], 3),
    (["25", 10, 28], 3),
    ([[25], 10, 28], 3),
    ({"lm_head": [25, 10, 28]}, 3),
    ({"embed_tokens": None}, 3),
    ({"": {}}, 3),
    ("embed_tokens", 3),
    ([25, 10, 64], 4),
    ([25, 10, 10**30], 4),
]


@pytest.mark.parametrize(("indices", "code"), TOKENS)
def test_token_indices_that_are_wrong(indices: Any, code: int, work: Work) -> None:
    for name, key in (("token-rows", "trainable_token_indices"), ("token-rows-only", "token_indices")):
        case = Case(name)
        work.refuse("merge", work.changed(case, **{key: indices}), "--base", case.base, codes=[code])


def broken(name: str) -> tuple[Case, dict[str, torch.Tensor | None], dict[str, Any]]:
    lora, moe, rows = Case("dora"), Case("moe-gpt-oss"), Case("token-rows")
    nan = torch.full((6, 12), float("nan"))
    return {
        "unknown leaf": (lora, {Q + "lora_C.weight": r(2, 2)}, {}),
        "empty": (lora, {Q + "lora_A.weight": torch.empty(0)}, {}),
        "empty rank": (lora, {Q + "lora_A.weight": torch.empty(0, 16), Q + "lora_B.weight": torch.empty(16, 0)}, {}),
        "no B": (lora, {Q + "lora_B.weight": None}, {}),
        "no magnitude": (lora, {Q + "lora_magnitude_vector": None}, {}),
        "magnitudes of a LoRA": (lora, {}, {"use_dora": False}),
        "twice": (lora, {Q + "lora_A.default.weight": r(2, 16)}, {}),
        "twice, compiled": (lora, {"_orig_mod." + Q + "lora_A.weight": r(2, 16)}, {}),
        "two adapters": (lora, {Q.replace("q_", "k_") + "lora_A.other.weight": r(2, 16)}, {}),
        "another prefix": (lora, {"x." + Q + "lora_A.weight": r(2, 16), "x." + Q + "lora_B.weight": r(16, 2)}, {}),
        "alpha 0": (lora, {}, {"lora_alpha": 0}),
        "experts NaN": (moe, {EXPERTS + "lora_A.weight": nan}, {}),
        "experts empty": (moe, {EXPERTS + "lora_A.weight": torch.empty(0)}, {}),
        "experts of three dimensions": (moe, {EXPERTS + "lora_A.weight": r(6, 12, 1)}, {}),
        "five ranks of three": (moe, {EXPERTS + "lora_A.weight": r(5, 12), EXPERTS + "lora_B.weight": r(16, 5)}, {}),
        "ranks that differ": (moe, {EXPERTS + "lora_A.weight": r(9, 12)}, {}),
        "no target_parameters": (moe, {}, {"target_parameters": None}),
        "of other parameters": (moe, {}, {"target_parameters": ["experts.gate_up_proj", "experts.absent"]}),
        "rows NaN": (rows, {ROWS: torch.full((3, 16), float("inf"))}, {}),
        "rows of one dimension": (rows, {ROWS: r(3)}, {}),
        "rows too wide": (rows, {ROWS: r(3, 17)}, {}),
        "rows twice": (rows, {"model.embed_tokens.trainable_tokens_delta": r(3, 16)}, {}),
        "experts with a magnitude": (moe, {EXPERTS + "lora_magnitude_vector": r(16)}, {"use_dora": True}),
        "experts with a bias": (moe, {EXPERTS + "lora_B.bias": r(16)}, {"lora_bias": True}),
        "experts without the outer": (moe, {EXPERTS + f"lora_{x}.weight": None for x in "AB"}, {}),
    }[name]


BROKEN = [
    *("unknown leaf", "empty", "empty rank", "no B", "no magnitude", "magnitudes of a LoRA", "twice"),
    *("twice, compiled", "two adapters", "another prefix", "alpha 0", "experts NaN", "experts empty"),
    *("experts of three dimensions", "five ranks of three", "ranks that differ", "no target_parameters"),
    *("of other parameters", "rows NaN", "rows of one dimension", "rows too wide", "rows twice"),
    *("experts with a magnitude", "experts with a bias", "experts without the outer"),
]


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_broken(name: str, work: Work) -> None:
    case, state, config = broken(name)
    work.refuse("merge", work.changed(case, state, **config), "--base", case.base)


def test_a_file_that_ends_early(work: Work) -> None:
    folder = work.changed(Case("moe-qwen3"))
    file = folder / "adapter_model.safetensors"
    for length in (len(file.read_bytes()) - 8, 200, 8, 3, 0):
        file.write_bytes(file.read_bytes()[:length])
        work.refuse("merge", folder, "--base", Case("moe-qwen3").base, codes=[3])


@pytest.mark.parametrize("depth", [9, 10, 50])
def test_base_layers_in_each_other(depth: int, work: Work) -> None:
    case = Case("moe-gpt-oss")
    state: dict[str, torch.Tensor | None] = {}
    for level in range(depth):
        state |= {f"{EXPERTS}{'base_layer.' * level}lora_{x}.weight": t for x, t in (("A", r(6, 16)), ("B", r(24, 6)))}
    folder = work.changed(case, state, target_parameters=[f"experts.p{i}" for i in range(depth)])
    work.refuse("merge", folder, "--base", case.base, codes=[4])
    work.refuse("inspect", folder)


WRONG: list[Any] = [
    *(None, -1, 0, 2.5, 10**30, 1e308, float("nan"), True, "", "x", [], {}, [[1]], [[[[]]]], [None], ["a", 3]),
    *({"a": {"b": [1]}}, {"q_proj": "8"}, {"q_proj": 1e308}, {"q_proj": [1]}, {"(a+)+$": 4}, {"(": 4}, {"": 4}),
    *({"(?<=a*)b": 3}, {"(" * 300: 3}, {"nblocks": 2, "target_modules_bd_a": 5}, [[0, 1000]], [[2, 1]], [10**12]),
]
CHANGES = {  # options that mean something else with another value, which is then merged as it says
    "lora_alpha": {-1, 2.5},
    "use_rslora": {True},
    "init_lora_weights": {None, True, "pissa", "olora"},
}


@pytest.mark.parametrize("name", ["rank-patterns", "moe-gpt-oss", "token-rows-dict", "bd-lora"])
def test_options_of_wrong_types(name: str, work: Work) -> None:
    """Each value of each option is refused with a sentence, or changes nothing."""
    case = Case(name)
    want = work.merge(case.path, "--base", case.base)
    fields = {*case.config, "kasa_config", "use_bdlora", "qalora_group_size", "lora_B_layout", "target_parameters"}
    fields |= {"layer_replication", "trainable_token_indices", "unsloth_fused_expert_lora", "peft_version", "auto_mapping"}
    tried = 0
    for field in sorted(fields):
        for value in WRONG[:: 3 if field not in ("r", "lora_alpha", "peft_type", "rank_pattern", "use_bdlora") else 1]:
            tried += 1
            folder, began = work.changed(case, **{field: value}), time.monotonic()
            out = work.path / "out"
            shutil.rmtree(out)
            code = work.run("merge", folder, "--base", case.base, "-o", out)
            assert time.monotonic() - began < 2, (field, value)
            if code == 0:
                unhashable = isinstance(value, list | dict)
                if unhashable or value not in CHANGES.get(field, ()):
                    same(tensors(out), want, 0)
                continue
            assert code in (3, 4, 5), (field, value, self_said := work.said, self_said)
            assert work.said.startswith("Error: ") and "bug" not in work.said and not out.exists(), (field, value)
            out.mkdir()
    assert tried > 200
