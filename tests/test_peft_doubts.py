"""What an attack on PEFT's LoRA found, and what it did not: refusals, merges, writing and operations on odd kinds.

The oracles are the trained models' own logits, PEFT, and the formulas in float64.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
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
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
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
        options: dict[str, list[Any]] = {"merge": ["--base", case.base], "convert": ["--to", "peft"], "inspect": []}
        more = options[command]
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
    layouts: list[Any] = ["mixed", "", [], {}, 5]
    for layout in layouts:
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
    every: dict[str, tuple[Case, dict[str, torch.Tensor | None], dict[str, Any]]] = {
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
    }
    return every[name]


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
# options that mean something with another value, which is then merged as it says
CHANGES: dict[str, Any] = {
    "lora_alpha": int | float,
    "use_rslora": bool,
    "alpha_pattern": dict,
    "kasa_config": dict,
    "use_bdlora": (),
    "target_parameters": (),
}
FIELDS = {
    *("kasa_config", "use_bdlora", "qalora_group_size", "lora_B_layout", "target_parameters", "layer_replication"),
    *("trainable_token_indices", "unsloth_fused_expert_lora", "peft_version", "auto_mapping", "token_indices"),
}


@pytest.mark.parametrize("name", ["rank-patterns", "moe-gpt-oss", "token-rows-dict", "bd-lora"])
def test_options_of_wrong_types(name: str, work: Work) -> None:
    """Each value of each option is refused with a sentence, or changes nothing."""
    case = Case(name)
    want = work.merge(case.path, "--base", case.base)
    tries = [(field, value) for field in sorted({*case.config, *FIELDS}) for value in WRONG]
    tries = tries[sum(map(ord, name)) % 17 :: 17]
    out, wrong = work.path / "out", []
    for field, value in tries:
        folder, began = work.changed(case, **{field: value}), time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        code = work.run("merge", folder, "--base", case.base, "-o", out)
        if code == 0:
            may = field in CHANGES and (value is None or isinstance(value, CHANGES[field]))
            good = may or all(torch.equal(t, want[n]) for n, t in tensors(out).items())
        else:
            good = code in (3, 4, 5) and work.said.startswith("Error: ") and "bug" not in work.said
            good = good and not out.exists()
        if not good or time.monotonic() - began > 2:
            wrong.append((field, value, code, work.said[:200]))
    assert not wrong
    assert len(tries) > 40


# --- 2: merges -------------------------------------------------------------------------------------------------------


def adapted(model: Any, seed: int = 5, size: float = 0.15, **config: Any) -> Any:
    """PEFT's model with an adapter of random values in place of a training."""
    import peft

    torch.manual_seed(seed)
    made = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                amount = 0.3 if "magnitude" in name else size
                parameter.add_(torch.randn_like(parameter) * amount * (parameter.abs().mean() + 0.5))
    return made


IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))


def computes(folder: Path, expected: Any) -> None:
    found = outputs(network(folder), IDS)
    assert np.abs(found - expected).max() < CLOSE


def test_experts_beside_layers_with_rslora(work: Work) -> None:
    base = BASES / "mixtral"
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    options: dict[str, Any] = {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]}
    model = adapted(network(base), **options, target_parameters=targets)
    model.save_pretrained(work.path / "adapter")
    expected = outputs(model, IDS)
    assert np.abs(expected - outputs(network(base), IDS)).max() > 0.1
    computes(work.do("merge", work.path / "adapter", "--base", base), expected)
    computes(
        work.do("merge", work.do("convert", work.path / "adapter", "--to", "peft", out="again"), "--base", base),
        expected,
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_three_ways_to_merge_what_took_from_the_base(start: str, dora: bool, work: Work) -> None:
    """The pristine base, what was left of it, and the adapter as it was: one result, the trained model's."""
    import peft

    base = BASES / "llama-small"
    config: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "use_dora": dora}
    began = peft.get_peft_model(network(base), peft.LoraConfig(**config, init_lora_weights=start))
    began.save_pretrained(work.path / "initial")
    began.unload().save_pretrained(work.path / "residual")
    model = adapted(network(base), **config, init_lora_weights=start)
    model.save_pretrained(work.path / "adapter")
    expected = outputs(model, IDS)
    for more in (
        ["--base", base],
        ["--base", base, "--initial-adapter", work.path / "initial"],
        ["--base", work.path / "residual", "--residual-base"],
    ):
        computes(work.do("merge", work.path / "adapter", *more), expected)


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa-rslora", "pissa-gpt2", "kasa"])
def test_a_strength_of_what_took_from_the_base(name: str, work: Work) -> None:
    case = Case(name)
    full = of_peft(case.path, case).merge_and_unload().state_dict()
    base = tensors(case.base)
    named = {n: full[n if n in full else f"transformer.{n}"] for n in base}
    for strength in (0.5, 1.0, -0.25):
        found = work.merge(case.path, "--base", case.base, "--strength", strength)
        same(found, between(base, named, strength))


def ulp(exact: Floats) -> Floats:
    """The distance of two neighbours in bfloat16."""
    found: Floats = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    return found


def as_bf16(exact: Floats) -> Floats:
    found: Floats = torch.from_numpy(exact).to(torch.bfloat16).double().numpy()  # float64 rounds to it once
    return found


def test_pissa_on_half_precision(work: Work) -> None:
    """The rest of the base is rounded to bfloat16, as in training; then one rounding of the sum."""
    case = Case("pissa-bf16")
    base, exact = floats(case.base), dict(floats(case.base))
    adapter = by_hand(case.path)
    for module, update in adapter.modules.items():
        u, s, v = np.linalg.svd(base[f"{module}.weight"], full_matrices=False)
        rank = update.a.shape[0]
        rest = as_bf16(base[f"{module}.weight"] - (u[:, :rank] * s[:rank]) @ v[:rank])
        exact[f"{module}.weight"] = rest + update.scaling * update.b @ update.a
    found = work.merge(case.path, "--base", case.base)
    for name, want in exact.items():
        off = np.abs(found[name].double().numpy() - want)
        assert found[name].dtype == torch.bfloat16
        # a value of the rest that lies between two numbers may be rounded the other way: a float32 SVD decides
        assert (off <= 0.51 * ulp(want)).mean() > 0.99 and (
            off <= 1.51 * np.maximum(ulp(want), ulp(base[name]))
        ).all(), name


@pytest.mark.parametrize("name", ["dora", "lora-embed-head", "rslora-dora"])
def test_a_base_in_half_precision(name: str, work: Work) -> None:
    case = Case(name)
    half = {n: t.to(torch.bfloat16) for n, t in tensors(case.base).items()}
    base = work.base(half, case.base)
    adapter = work.changed(case, {n.removeprefix(MODEL): None for n in saved_copies(case)})
    want = scaled_of(adapter, floats(base))
    found = work.merge(adapter, "--base", base)
    for n, exact in want.items():
        off = np.abs(found[n].double().numpy() - exact)
        assert (
            found[n].dtype == torch.bfloat16 and (off <= ulp(exact)).all() and (off <= 0.51 * ulp(exact)).mean() > 0.999
        )


def saved_copies(case: Case) -> list[str]:
    """Untrained embeddings that PEFT saves beside an adapter of them."""
    return [name for name in load_file(case.path / "adapter_model.safetensors") if ".base_layer.weight" in name]


def scaled_of(adapter: Path, weights: Weights) -> Weights:
    return merged_by_hand(weights, by_hand(adapter), False)


def experts_by_hand(case: Case, first: bool = False) -> dict[str, Floats]:
    """s · B A of each expert of each adapted parameter, (out, in), by the reference page alone."""
    state = {
        n.removeprefix(MODEL): t.double().numpy() for n, t in load_file(case.path / "adapter_model.safetensors").items()
    }
    found: dict[str, Floats] = {}
    bare_alone = not any("experts.base_layer." in name for name in state)
    targets = [name.rpartition(".")[2] for name in case.config["target_parameters"]]
    for name, a in state.items():
        if not name.endswith("experts.lora_A.weight") and not name.endswith("experts.base_layer.lora_A.weight"):
            continue
        b = state[name.replace("lora_A", "lora_B")]
        inner = ".base_layer." in name
        parameter = targets[0] if bare_alone else "gate_up_proj" if inner else "down_proj"
        rank, alpha = case.config["r"], case.config["lora_alpha"]
        count = a.shape[0] // rank
        scaling = alpha / rank**0.5 if case.config["use_rslora"] else alpha / rank
        a, b = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count)
        for e in range(count):
            delta = scaling * b[:, :, e] @ a[e]
            found[f"{name.partition('experts.')[0]}experts.{e}.{parameter}"] = delta.T if first else delta
    return found


def with_experts(weights: Weights, deltas: Mapping[str, Floats], strength: float = 1.0) -> Weights:
    """Of Mixtral or Qwen3-MoE on disk: gate and up are the halves of one parameter."""
    result = dict(weights)
    mixtral = any("block_sparse_moe" in name for name in weights)
    for module, delta in deltas.items():
        stem, _, parameter = module.rpartition(".")
        half = delta.shape[0] // 2
        parts = (
            {"down_proj": delta} if parameter == "down_proj" else {"gate_proj": delta[:half], "up_proj": delta[half:]}
        )
        for leaf, part in parts.items():
            name = f"{stem}.{leaf}.weight"
            if mixtral:
                name = name.replace(".mlp.", ".block_sparse_moe.").replace("gate_proj", "w1").replace("up_proj", "w3")
                name = name.replace("down_proj", "w2")
            assert name in result
            result[name] = result[name] + strength * part
    return result


def test_two_adapters_of_experts(work: Work) -> None:
    """Of two versions of PEFT, whose factors are of opposite axes, and of one parameter alone."""
    cases = {Case("moe-mixtral"): 0.7, Case("moe-mixtral-peft-0-18-1"): -0.4, Case("moe-mixtral-down"): 1.3}
    base = BASES / "mixtral"
    want = floats(base)
    for case, strength in cases.items():
        want = with_experts(want, experts_by_hand(case, first="0-18" in case.name), strength)
    strengths = [word for strength in cases.values() for word in ("--strength", strength)]
    same(work.merge(*(case.path for case in cases), "--base", base, *strengths), want)


def test_lora_and_dora_in_one_merge(work: Work) -> None:
    base = BASES / "llama-small"
    weights = floats(base)
    cases = {"dora": 0.6, "lora-embed-head": 1.0, "token-rows": -0.3}
    adapters, want = [], dict(weights)
    for name, strength in cases.items():
        case = Case(name)
        adapter = work.changed(case, {n.removeprefix(MODEL): None for n in saved_copies(case)}).rename(work.path / name)
        full = scaled_of(adapter, weights) if name != "token-rows" else rows_by_hand(case, weights)
        want = {n: w + strength * (full[n] - weights[n]) for n, w in want.items()}
        adapters.append(adapter)
    strengths = [word for strength in cases.values() for word in ("--strength", strength)]
    same(work.merge(*adapters, "--base", base, *strengths), want)


def rows_by_hand(case: Case, weights: Weights, *names: str) -> Weights:
    """Rows replaced, then the LoRA of the other layers."""
    state = load_file(case.path / "adapter_model.safetensors")
    lora = {n: t for n, t in state.items() if "trainable_tokens" not in n}
    result = dict(weights)
    for module in {name.removeprefix(MODEL).rpartition(".lora_")[0] for name in lora}:
        a, b = (lora[f"{MODEL}{module}.lora_{x}.weight"].double().numpy() for x in "AB")
        result[f"{module}.weight"] = result[f"{module}.weight"] + case.config["lora_alpha"] / case.config["r"] * b @ a
    for name in names or ("model.embed_tokens.weight",):
        result[name] = result[name].copy()
        result[name][case.facts["rows"]] = state[MODEL + ROWS].double().numpy()
    return result


def test_a_saved_copy_of_the_base_changes_nothing(work: Work) -> None:
    """PEFT saves the embedding beside its LoRA; where that is the base's it is no obstacle to another adapter."""
    base = BASES / "llama-small"
    both = [Case("lora-embed-head").path, Case("token-rows").path]
    plain = [
        work.changed(
            Case("lora-embed-head"), {n.removeprefix(MODEL): None for n in saved_copies(Case("lora-embed-head"))}
        )
    ]
    want = work.merge(*plain, both[1], "--base", base)
    same(work.merge(*both, "--base", base), want)


@pytest.mark.parametrize(
    "name", ["tied-lora", "tied-token-rows", "token-rows-tied", "token-rows-only-tied", "tied-modules"]
)
@pytest.mark.parametrize("stored", ["embed", "both", "head"])
def test_a_tie_on_bases_that_store_one_end_or_both(name: str, stored: str, work: Work) -> None:
    case = Case(name)
    state = tensors(case.base)
    embedding = state["model.embed_tokens.weight"]
    state |= {} if stored == "embed" else {"lm_head.weight": embedding.clone()}
    if stored == "head":
        del state["model.embed_tokens.weight"]
    folder = work.do("merge", case.path, "--base", work.base(state, case.base))
    found = tensors(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    ends = [found[n] for n in ("model.embed_tokens.weight", "lm_head.weight") if n in found]
    assert len(ends) == (2 if stored == "both" else 1) and torch.equal(ends[0], ends[-1])
    model = network(case.base)
    model.load_state_dict({**found, "model.embed_tokens.weight": ends[0], "lm_head.weight": ends[0]})
    assert np.abs(outputs(model, case.inputs) - case.expected).max() < CLOSE


@pytest.mark.parametrize("name", ["tied-lora", "lora-embed-tied", "lora-head-tied", "lora-embed-head"])
def test_a_strength_beside_a_saved_copy_of_the_base(name: str, work: Work) -> None:
    case = Case(name)
    base, full = floats(case.base), work.merge(case.path, "--base", case.base)
    base.setdefault("lm_head.weight", base["model.embed_tokens.weight"])
    same(work.merge(case.path, "--base", case.base, "--strength", 0.5), between(base, full, 0.5))


def test_a_saved_end_of_a_tie_that_both_update(work: Work) -> None:
    """LoRA on both ends, alike, and one of them saved whole besides: it is updated all the same."""
    case = Case("tied-lora")
    adapter = work.changed(case, {"model.embed_tokens.base_layer.weight": None})
    trained(case, work.do("merge", adapter, "--base", case.base))


ENDS: list[dict[str, Any]] = [
    {"target_modules": ["lm_head"], "trainable_token_indices": [5, 9]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 9]}},
    {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [5, 9]}},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 9], "embed_tokens": [5, 9]}},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 9], "embed_tokens": [5, 7]}},
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("stored", ["embed", "both", "head"])
@pytest.mark.parametrize("config", ENDS, ids=[str(number) for number in range(len(ENDS))])
def test_what_is_trained_at_the_ends_of_a_tie(config: dict[str, Any], stored: str, work: Work) -> None:
    """Rows of the embedding are the head's too, if that has none of its own; rows of the head are its own."""
    tied = BASES / "llama-small-tied"
    model = adapted(network(tied), r=2, lora_alpha=3, **config)
    model.save_pretrained(work.path / "adapter")
    state = tensors(tied)
    if stored != "embed":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if stored == "head":
        del state["model.embed_tokens.weight"]
    found = work.merge(work.path / "adapter", "--base", work.base(state, tied))
    merged = network(BASES / "llama-small")  # whose ends are two tensors
    one = next(found[n] for n in ("model.embed_tokens.weight", "lm_head.weight") if n in found)
    merged.load_state_dict({"model.embed_tokens.weight": one, "lm_head.weight": one, **found})
    assert np.abs(outputs(merged, IDS) - outputs(model, IDS)).max() < CLOSE


def test_a_tie_of_more_than_two(work: Work) -> None:
    """Where one of them goes its own way, the others keep what they have in common."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 20,
        "max_position_embeddings": 32,
    }
    more = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    kind = transformers.BartForConditionalGeneration
    whole = kind(transformers.BartConfig(**sizes, **more, init_std=0.2)).eval()
    whole.save_pretrained(work.path / "base")

    def heard(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits.numpy()

    before = heard(whole)
    model = adapted(whole, r=2, lora_alpha=3, target_modules=["lm_head"], trainable_token_indices={"shared": [5, 9, 7]})
    model.save_pretrained(work.path / "adapter")
    assert np.abs(heard(model) - before).max() > 0.1
    folder = work.do("merge", work.path / "adapter", "--base", work.path / "base")
    again, said = kind.from_pretrained(folder, output_loading_info=True)
    assert not said["unexpected_keys"]
    assert np.abs(heard(again.eval()) - heard(model)).max() < CLOSE


def test_a_base_of_several_files(work: Work) -> None:
    case = Case("moe-qwen3")
    network(case.base).save_pretrained(work.path / "base", max_shard_size="6KB")
    assert len(list((work.path / "base").glob("*.safetensors"))) > 3
    trained(case, work.do("merge", case.path, "--base", work.path / "base"))


PREFIXES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("rslora-dora", "model.", "", {"architectures": ["LlamaModel"]}),
    ("rslora-dora", "", "backbone.", {}),
    ("moe-qwen3", "model.", "", {"architectures": ["Qwen3MoeModel"]}),
    ("moe-mixtral", "model.", "", {"architectures": ["MixtralModel"]}),
    ("moe-gpt-oss", "model.", "", {"architectures": ["GptOssModel"]}),
    ("modules-to-save-classifier", "bert.", "", {"architectures": ["BertModel"]}),
]


@pytest.mark.parametrize(("name", "drop", "add", "config"), PREFIXES)
def test_a_base_under_another_prefix(name: str, drop: str, add: str, config: dict[str, Any], work: Work) -> None:
    case = Case(name)

    def rename(state: State) -> State:
        heads = ("lm_head", "classifier")
        return {add + n.removeprefix(drop): t for n, t in state.items() if not (drop and n.startswith(heads))}

    want = rename(work.merge(case.path, "--base", case.base))
    base = work.base(rename(tensors(case.base)), case.base, **config)
    found = work.merge(case.path, "--base", base)
    same({n: t for n, t in found.items() if n in want}, want, 0)
    assert not any(
        torch.equal(found[n], t) for n, t in tensors(base).items() if ".q_proj." in n and "q_proj" in str(case.config)
    )
    assert {n for n in found if n not in want} <= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    "name",
    [
        "moe-v4-mixtral",
        "moe-v4-mixtral-dora",
        "moe-v4-mixtral-some",
        "moe-v4-mixtral-w1",
        "moe-mixtral",
        "moe-mixtral-peft-0-18-1",
        "moe-mixtral-layers",
    ],
)
def test_experts_that_are_fused_on_disk(name: str, work: Work) -> None:
    case = Case(name)
    model = network(case.base)
    base = work.base(model.state_dict(), case.base)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(base)
    model.load_state_dict(work.merge(case.path, "--base", base))
    assert np.abs(outputs(model, case.inputs) - case.expected).max() < CLOSE


def test_names_of_vision_language_models(work: Work) -> None:
    """LLaVA by both versions of transformers: the adapter's names and the base's in each combination."""
    import transformers

    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    sight = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**sight, patch_size=4)
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(work.path / "disk")
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = tensors(work.path / "disk")
    old = {
        n.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("model.multi_modal_projector.", "multi_modal_projector."): t
        for n, t in new.items()
    }
    made = adapted(model, r=2, lora_alpha=3, target_modules=["q_proj", "down_proj", "lm_head"])
    made.save_pretrained(work.path / "new", save_embedding_layers=False)
    shutil.copytree(work.path / "new", work.path / "old")
    state = load_file(work.path / "new" / "adapter_model.safetensors")
    renamed = {
        MODEL
        + n.removeprefix(MODEL)
        .replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.vision_tower.", "vision_tower."): t
        for n, t in state.items()
    }
    assert renamed.keys() != state.keys()
    save_file(renamed, work.path / "old" / "adapter_model.safetensors")
    full = {n: t.clone() for n, t in made.merge_and_unload().state_dict().items()}
    wanted = sorted(float(t.double().sum()) for t in full.values())
    for what, base in (("disk", saved), ("new", new), ("old", old)):
        folder = work.path / "disk" if what == "disk" else work.base(base, work.path / "disk")
        for adapter in ("new", "old"):
            found = work.merge(work.path / adapter, "--base", folder)
            assert found.keys() == base.keys()
            sums = sorted(float(t.double().sum()) for t in found.values())
            np.testing.assert_allclose(sums, wanted, atol=1e-4)
            changed = [n for n in found if not torch.equal(found[n], base[n])]
            assert len(changed) == 1 * 2 + 2 + 1


@pytest.mark.parametrize(
    "name", ["moe-qwen3", "moe-gpt-oss", "pissa", "token-rows-dict", "mha", "layer-replication", "tied-lora"]
)
def test_threads_and_laziness_change_no_byte(name: str, work: Work) -> None:
    case = Case(name)
    one = work.merge(case.path, "--base", case.base, "--threads", 1)
    three = work.merge(case.path, "--base", case.base, "--threads", 3, out="three")
    files = [(work.path / folder / "model.safetensors").read_bytes() for folder in ("out", "three")]
    assert files[0] == files[1]
    lazy = dora_tools.merged(case.path, case.base)
    assert set(lazy) == set(one)
    for name in reversed(list(lazy)):
        assert torch.equal(lazy[name][...], one[name]) and torch.equal(one[name], three[name])


@pytest.mark.parametrize("table", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["attn", "out_proj", r"attn\\.out_proj"])
def test_patterns_of_an_attention_are_of_its_out_proj_too(pattern: str, table: str, work: Work) -> None:
    """PEFT looks up one rank and alpha for both; a pattern that names the out_proj does nothing."""
    case = Case("mha")
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["attn"], table: {pattern: 4}}
    model = adapted(network(case.base), **config)
    model.save_pretrained(work.path / "adapter")
    folder = work.do("merge", work.path / "adapter", "--base", case.base)
    shutil.copy(case.base / "network.json", folder)
    assert np.abs(outputs(network(folder), case.inputs) - outputs(model, case.inputs)).max() < CLOSE


def test_two_parameters_of_the_same_shape_go_by_the_order_of_the_model(work: Work) -> None:
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    more = {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**sizes, **more, pad_token_id=0, attn_implementation="eager")
    network_of = transformers.GptOssForCausalLM(config).eval()
    network_of.save_pretrained(work.path / "base")
    names = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]
    model = adapted(network_of, r=2, lora_alpha=3, target_modules=[], target_parameters=names)
    model.save_pretrained(work.path / "adapter")
    state = load_file(work.path / "adapter" / "adapter_model.safetensors")
    assert len({tuple(t.shape) for n, t in state.items() if "lora_A" in n}) == 1
    computes(work.do("merge", work.path / "adapter", "--base", work.path / "base"), outputs(model, IDS))


def test_experts_of_a_version_that_is_said(work: Work) -> None:
    case = Case("moe-gpt-oss-square-down-peft-0-17-1")  # 0.18 is as 0.17
    trained(case, work.do("merge", case.path, "--base", case.base, "--peft-version", "0.18.1"))


@pytest.mark.parametrize("experts", [3, 6])
def test_a_gate_that_is_stored_turned(experts: int, work: Work) -> None:
    """Of ERNIE 4.5 VL, whose router is (in, out) on disk."""
    disk = {"model.layers.0.mlp.gate.weight": r(6, experts), "model.layers.0.mlp.gate.weight_1": r(6, experts)}
    base, folder = work.path / "base", work.path / "adapter"
    for path in (base, folder):
        path.mkdir()
    save_file(disk, base / "model.safetensors")
    named = "Ernie4_5_VLMoeForConditionalGeneration"
    (base / "config.json").write_text(json.dumps({"architectures": [named], "model_type": "ernie4_5_vl_moe"}))
    factors = {"lora_A.weight": r(2, 6), "lora_B.weight": r(experts, 2)}
    state = {f"{MODEL}model.language_model.layers.0.mlp.vision_moe.gate.{n}": t for n, t in factors.items()}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    found = work.merge(folder, "--base", base)
    delta = 3 * factors["lora_B.weight"] @ factors["lora_A.weight"]
    changed = "model.layers.0.mlp.gate.weight_1"
    same(found, {**disk, changed: disk[changed] + delta.T})


def test_lists_for_each_layer_are_repeated_with_the_layers(work: Work) -> None:
    case = Case("layer-replication")
    kinds = ["full_attention", "sliding_attention"]
    base = work.base(tensors(case.base), case.base, layer_types=kinds, sliding_layers=[3, 1], other=[1, 2])
    config = json.loads((work.do("merge", case.path, "--base", base) / "config.json").read_text())
    assert config["layer_types"] == [kinds[0], kinds[1], kinds[1]] and config["sliding_layers"] == [3, 1, 1]
    assert config["num_hidden_layers"] == 3 and config["other"] == [1, 2]


# --- 3: writing ------------------------------------------------------------------------------------------------------

FOLDED = ["dora", "rank-patterns", "rslora-dora", "lora-bias", "mha", "moe-qwen3", "moe-mixtral-patterns"]


@pytest.mark.parametrize("name", FOLDED)
def test_folded_for_readers_that_know_one_rank_and_alpha(name: str, work: Work) -> None:
    case = Case(name)
    folder = work.do("convert", case.path, "--to", "peft", "--fold-scaling", out="made")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["use_rslora"] is False
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    found = outputs(of_peft(folder, case), case.inputs)
    assert np.abs(found - case.expected).max() < CLOSE
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    again = work.do("convert", case.path, "--to", "peft", "--fold-scaling", out="again")
    assert first == {p.name: p.read_bytes() for p in again.iterdir()}
    twice = work.do("convert", folder, "--to", "peft", "--fold-scaling", out="twice")
    assert first == {p.name: p.read_bytes() for p in twice.iterdir()}


@pytest.mark.parametrize("name", ["rank-patterns", "rslora-dora"])
def test_a_reader_that_ignores_patterns(name: str, work: Work) -> None:
    """As vLLM reads: alpha / r of the config for all modules."""
    case = Case(name)
    folder = work.do("convert", case.path, "--to", "peft", "--fold-scaling", out="made")
    state, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    exact = by_hand(case.path)
    assert len({update.scaling for update in exact.modules.values()}) > 1 or config["r"] != case.config["lora_alpha"]
    for module, update in exact.modules.items():
        a, b = (state[f"{MODEL}{module}.lora_{x}.weight"].double().numpy() for x in "AB")
        assert a.shape[0] == config["r"]
        np.testing.assert_allclose(
            config["lora_alpha"] / config["r"] * b @ a, update.scaling * update.b @ update.a, atol=1e-6
        )


@pytest.mark.parametrize(
    "name",
    ["layer-replication", "token-rows", "token-rows-dict", "modules-to-save-embed", "resized-saved", "lora-embed-head"],
)
def test_what_else_a_folded_adapter_keeps(name: str, work: Work) -> None:
    case = Case(name)
    folder = work.do("convert", case.path, "--to", "peft", "--fold-scaling", out="made")
    assert np.abs(outputs(of_peft(folder, case), case.inputs) - case.expected).max() < CLOSE
    trained(case, work.do("merge", folder, "--base", case.base))


@pytest.mark.parametrize("source", ["lightning", "gguf", "minlora"])
def test_folding_what_other_tools_wrote(source: str, work: Work) -> None:
    case = Case("gaussian")
    state = load_file(case.path / "adapter_model.safetensors")
    adapter, more = case.path, ["--base", case.base]
    if source == "gguf":
        adapter = work.do("convert", case.path, "--to", "gguf", "--base", case.base, out="a.gguf")
    elif source == "minlora":
        adapter = work.do("convert", case.path, "--to", "minlora", "--base", case.base, out="a")
        more += ["--scaling", 1]
    else:
        adapter = work.path / "a.ckpt"
        named = {
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for name, t in state.items()
        }
        torch.save({"state_dict": {f"{MODEL}{name}": t for name, t in named.items()}, "epoch": 1}, adapter)
        more += ["--alpha", case.config["lora_alpha"], "--scale-rule", "alpha/rank"]
    folder = work.do("convert", adapter, "--to", "peft", "--fold-scaling", *more, out="made")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == case.config["r"]
    trained(case, work.do("merge", folder, "--base", case.base))


def test_old_experts_are_not_turned_without_the_base(work: Work) -> None:
    for name in ("moe-mixtral-peft-0-18-1", "moe-gpt-oss-peft-0-17-1", "moe-gpt-oss-peft-0-19-0"):
        work.refuse("convert", Case(name).path, "--to", "peft", words=["--base"], codes=[3])
    case = Case("moe-mixtral-peft-0-18-1")
    folder = work.do("convert", case.path, "--to", "peft", "--base", case.base)
    assert np.abs(outputs(of_peft(folder, case), case.inputs) - case.expected).max() < CLOSE


@pytest.mark.parametrize("name", ["tied-lora", "tied-modules", "lora-embed-tied", "lora-head-tied", "token-rows-tied"])
def test_a_tie_survives_being_written_beside_its_base(name: str, work: Work) -> None:
    """The base's own tensors are left out then, which may not leave a copy of one for the other end."""
    case = Case(name)
    want = work.merge(case.path, "--base", case.base)
    folder = work.do("convert", case.path, "--to", "peft", "--base", case.base, out="again")
    same(work.merge(folder, "--base", case.base), want, 0)


# --- 4: operations ---------------------------------------------------------------------------------------------------

KINDS = [
    "moe-qwen3",
    "moe-gpt-oss",
    "mha",
    "token-rows",
    "pissa",
    "layer-replication",
    "tied-lora",
    "moe-granite",
    "moe-gpt-oss-bias",
    "moe-mixtral-router",
    "kasa",
]


def right(work: Work, case: Case, want: State, *arguments: object, strength: float = 1.0) -> bool:
    """An operation's adapter merges to what it should, or it is refused with a sentence; whether it was done."""
    shutil.rmtree(work.path / "made", ignore_errors=True)
    if work.run(*arguments, "-o", work.path / "made") != 0:
        work.refuse(*arguments, codes=[2, 3, 4, 5])
        return False
    found = work.merge(work.path / "made", "--base", case.base)
    base = {**tensors(case.base)}
    if strength != 1.0:
        full = {n: base[n] for n in want if n in base}
        want = {n: torch.from_numpy(v) for n, v in between(full, {n: want[n] for n in full}, strength).items()}
    if "lm_head.weight" not in want and "lm_head.weight" in found:  # untied
        want = {**want, "lm_head.weight": want["model.embed_tokens.weight"]}
    same({n: t for n, t in found.items() if n in want}, want)
    return True


@pytest.mark.parametrize("name", KINDS)
def test_operations_that_keep_what_is_merged(name: str, work: Work) -> None:
    case = Case(name)
    want = work.merge(case.path, "--base", case.base)
    path, base = case.path, ["--base", case.base]
    done = [
        right(work, case, want, "rescale", path, "--rank", 5),
        right(work, case, want, "rescale", path, "--set-alpha", 7),
        right(work, case, want, "rescale", path, "--rslora"),
        right(work, case, want, "rescale", path, "--rank", 5, *base),
        right(work, case, want, "combine", path),
        right(work, case, want, "combine", path, *base),
        right(work, case, want, "combine", path, path, "--weight", 0.5),
        right(work, case, want, "combine", path, "--weight", 0.5, strength=0.5),
        right(work, case, want, "to-dora", path, *base),
        right(work, case, want, "to-lora", path, *base, "--rank", 6),
        right(work, case, want, "convert", path, "--to", "peft"),
        right(work, case, want, "convert", path, "--to", "peft", "--fold-scaling", *base),
    ]
    assert sum(done) >= (1 if name in ("pissa", "kasa") else 4)
    for more in ([], base, [*base, "--stats"], ["--json", *base, "--stats"], ["--stats"]):
        assert work.run("inspect", path, *more) == 0, work.said


REREAD = ["mha", "moe-qwen3", "moe-gpt-oss", "moe-mixtral-router", "rank-patterns", "layer-replication", "bd-lora"]


@pytest.mark.parametrize("name", [*REREAD, "token-rows", "tied-lora", "qalora", "lora-bias", "rslora-dora"])
def test_peft_reads_what_operations_wrote_as_we_do(name: str, work: Work) -> None:
    case = Case(name)
    for arguments in (["rescale", "--set-alpha", 7], ["rescale", "--energy", 0.6], ["combine", "--weight", 0.5]):
        made = work.path / "made"
        shutil.rmtree(made, ignore_errors=True)
        if work.run(arguments[0], case.path, *arguments[1:], "-o", made) != 0:
            work.refuse(arguments[0], case.path, *arguments[1:], codes=[2, 3, 4, 5])
            continue
        folder = work.do("merge", made, "--base", case.base)
        if case.is_network:
            shutil.copy(case.base / "network.json", folder)
        found = outputs(of_peft(made, case), case.inputs) - outputs(network(folder), case.inputs)
        assert np.abs(found).max() < CLOSE, arguments


@pytest.mark.parametrize("name", ["moe-gpt-oss", "moe-qwen3", "mha", "moe-mixtral-router", "moe-gpt-oss-bias"])
def test_no_dora_is_written_that_peft_has_not(name: str, work: Work) -> None:
    case = Case(name)
    work.refuse("to-dora", case.path, "--base", case.base)


@pytest.mark.parametrize("name", ["pissa", "olora", "kasa"])
def test_what_took_from_the_base_is_no_plain_lora(name: str, work: Work) -> None:
    case = Case(name)
    shutil.rmtree(work.path / "made", ignore_errors=True)
    if work.run("to-lora", case.path, "--base", case.base, "--rank", 6, "-o", work.path / "made") == 0:
        trained(case, work.do("merge", work.path / "made", "--base", case.base))
    else:
        assert "plain LoRA already" not in work.said


@pytest.mark.parametrize("name", ["moe-v4-mixtral", "moe-v4-mixtral-dora"])
def test_operations_on_layers_that_the_base_has_in_one_tensor(name: str, work: Work) -> None:
    case = Case(name)
    base = work.base(network(case.base).state_dict(), case.base)
    want = work.merge(case.path, "--base", base)
    more, made = ["--base", base], work.path / "made"
    for arguments, exact in (
        (["rescale", case.path, "--rank", 3], True),
        (["rescale", case.path, "--rank", 1], False),
        (["rescale", case.path, "--rank", 1, "--refit"], False),
        (["rescale", case.path, "--rank", 1, "--weighted"], False),
        (["to-lora", case.path, "--rank", 12], True),
        (["to-dora", case.path], True),
        (["combine", case.path, case.path, "--weight", 0.5, "--rank", 12], True),
        (["combine", case.path, case.path, "--weight", 0.5, "--rank", 12, "--method", "ties", "--density", 1], False),
    ):
        shutil.rmtree(made, ignore_errors=True)
        if work.run(*arguments, *more, "-o", made) != 0:
            work.refuse(*arguments, *more, codes=[2, 3, 4, 5])
        elif exact:
            same(work.merge(made, *more), want)


def test_operations_on_a_tie_that_no_option_tells_of(work: Work) -> None:
    case = Case("tied-lora")
    want = work.merge(case.path, "--base", case.base)
    adapter = work.changed(case, ensure_weight_tying=False).rename(work.path / "adapter")
    for arguments in (["rescale", "--rank", 3], ["combine"], ["to-dora"], ["to-lora", "--rank", 4]):
        right(work, case, want, arguments[0], adapter, *arguments[1:], "--base", case.base)


@pytest.mark.parametrize("name", ["loha", "hira"])
def test_no_plain_lora_is_said_where_there_is_none(name: str, work: Work) -> None:
    """Other methods become a LoRA, exactly at the full rank, or are refused for what they are."""
    case = Case(name)
    if work.run("to-lora", case.path, "--base", case.base, "--rank", 32, "-o", work.path / "made") == 0:
        same(work.merge(work.path / "made", "--base", case.base), work.merge(case.path, "--base", case.base))
    else:
        assert "plain LoRA already" not in work.said


@pytest.mark.parametrize("name", ["moe-qwen3", "moe-gpt-oss"])
def test_errors_of_experts_are_those_of_all_their_rows(name: str, work: Work) -> None:
    """Measured in the base, where gate and up lie apart, or all experts in one tensor: both right or refused."""
    case = Case(name)
    out = work.path / "made"
    if work.run("rescale", case.path, "--rank", 1, "--base", case.base, "--json", "-o", out) != 0:
        work.refuse("rescale", case.path, "--rank", 1, "--base", case.base)
        return
    said = {m["module"]: m["error"] for m in json.loads(work.printed)["modules"]}
    exact = experts_by_hand(case)
    for module, delta in exact.items():
        values = np.linalg.svd(delta, compute_uv=False)
        if said[module] is not None:
            np.testing.assert_allclose(said[module], np.sqrt((values[1:] ** 2).sum()), rtol=1e-4)


@pytest.mark.parametrize("to", ["fsdp-lora", "loralib", "minlora", "rasbt-lora", "gguf"])
@pytest.mark.parametrize("name", ["mha", "layer-replication", "token-rows", "pissa", "moe-qwen3", "moe-gpt-oss-bias"])
def test_other_formats_hold_it_or_refuse(name: str, to: str, work: Work) -> None:
    case = Case(name)
    want = work.merge(case.path, "--base", case.base)
    out = work.path / "made"
    if work.run("convert", case.path, "--to", to, "--base", case.base, "-o", out) != 0:
        work.refuse("convert", case.path, "--to", to, "--base", case.base, codes=[4, 5])
        return
    more = [] if to == "gguf" else ["--scaling", 1]
    same(work.merge(out, "--base", case.base, *more), want)


def test_two_parameters_of_one_module(work: Work) -> None:
    """Of the same shape: they are two updates, not two shares of one."""
    base = work.path / "plain"
    base.mkdir()
    weights = {"body.first": r(6, 4), "body.second": r(6, 4)}
    save_file(weights, base / "model.safetensors")
    state = {f"body.{n}": t for n, t in (("lora_A.weight", r(2, 4)), ("lora_B.weight", r(6, 2)))}
    state |= {f"body.base_layer.{n}": t for n, t in (("lora_A.weight", r(2, 4)), ("lora_B.weight", r(6, 2)))}
    folder = work.path / "two"
    folder.mkdir()
    save_file({MODEL + n: t for n, t in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["body.first", "body.second"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if work.run("merge", folder, "--base", base, "-o", work.path / "out") != 0:
        work.refuse("merge", folder, "--base", base)
        return
    want = tensors(work.path / "out")
    for command in (
        ["rescale", folder, "--rank", 3],
        ["combine", folder],
        ["combine", folder, folder, "--weight", 0.5],
    ):
        if work.run(*command, "--base", base, "-o", work.path / "made") == 0:
            same(work.merge(work.path / "made", "--base", base), want)
            shutil.rmtree(work.path / "made")


def test_extracting_from_a_merge_of_experts(work: Work) -> None:
    """What was merged into the experts' own matrices is found again, exactly at the full rank."""
    case = Case("moe-qwen3")
    merged = work.do("merge", case.path, "--base", case.base)
    made = work.do("extract", "--base", case.base, "--tuned", merged, "--rank", 12, out="made")
    same(work.merge(made, "--base", case.base, out="again"), tensors(merged))


# --- 5: GGUF ---------------------------------------------------------------------------------------------------------


def hf_model(name: str) -> Any:
    home = gguf_models.family(name)
    return network(home.folder), home


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
@pytest.mark.parametrize("old", [False, True])
def test_experts_into_a_gguf(name: str, old: bool, work: Work) -> None:
    """The oracle: PEFT's own merge of the Hugging Face model, as the converter would have written it."""
    model, home = hf_model(name)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    made = adapted(model, size=0.05, r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    made.save_pretrained(work.path / "a")
    config = json.loads((work.path / "a" / "adapter_config.json").read_text())
    merged = made.merge_and_unload()
    merged.save_pretrained(work.path / "hf")
    want = home.converted(floats(work.path / "hf"))
    if old:  # as PEFT 0.18 had it: (B A)ᵀ, expert by expert
        state = load_file(work.path / "a" / "adapter_model.safetensors")
        swapped = dict(state)
        for key, a in state.items():
            if "experts" in key and "lora_A" in key:
                b = state[other := key.replace("lora_A", "lora_B")]
                count = a.shape[0] // 2
                swapped[key] = b.reshape(-1, 2, count).permute(2, 1, 0).reshape(2 * count, -1).contiguous()
                swapped[other] = a.reshape(count, 2, -1).permute(2, 1, 0).reshape(-1, 2 * count).contiguous()
        save_file(swapped, work.path / "a" / "adapter_model.safetensors")
        (work.path / "a" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    assert work.run("merge", work.path / "a", "--base", home.base, "-o", work.path / "m.gguf") == 0, work.said
    found = gguf_models.read(work.path / "m.gguf").values
    assert found.keys() == want.keys()
    kinds = gguf_models.read(home.base).types
    for tensor, values in want.items():
        gguf_models.assert_close(found[tensor], values, tensor, 1e-5 if kinds[tensor] == "F32" else 1e-2)
    moved = [n for n, t in gguf_models.read(home.base).values.items() if not np.array_equal(t, found[n])]
    assert len([n for n in moved if "_exps" in n]) == 6


def test_token_rows_and_pissa_into_a_gguf(work: Work) -> None:
    model, home = hf_model("llama")
    made = adapted(model, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[5, 9, 2])
    made.save_pretrained(work.path / "a")
    made.merge_and_unload().save_pretrained(work.path / "hf")
    assert work.run("merge", work.path / "a", "--base", home.base, "-o", work.path / "m.gguf") == 0, work.said
    want, found = home.converted(floats(work.path / "hf")), gguf_models.read(work.path / "m.gguf").values
    for tensor, values in want.items():
        gguf_models.assert_close(found[tensor], values, tensor, 1e-5)
    for start in ("pissa", "olora"):
        model = network(home.folder)
        made = adapted(
            model, r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=start
        )
        made.save_pretrained(work.path / start)
        made.merge_and_unload().save_pretrained(work.path / f"{start}-hf")
        code = work.run("merge", work.path / start, "--base", home.base, "-o", work.path / f"{start}.gguf")
        if code != 0:
            work.refuse("merge", work.path / start, "--base", home.base)
            continue
        want = home.converted(floats(work.path / f"{start}-hf"))
        found = gguf_models.read(work.path / f"{start}.gguf").values
        for tensor, values in want.items():
            gguf_models.assert_close(found[tensor], values, f"{start} {tensor}", 1e-4)  # whose SVD is float32
