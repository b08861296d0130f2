"""The cases under ``fixtures/peft/``: adapters as PEFT's versions wrote them, and what their trained models compute.

``fixtures/make_peft*.py`` made them; ``case.json`` says with which versions, on which base, and where PEFT itself reads
its own file otherwise than it was trained (``peft_reload``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dora_tools.formats import Given
from dora_tools.opening import initial

ROOT = Path(__file__).resolve().parent.parent / "fixtures" / "peft"
BASES = ROOT / "bases"
# what only the user can say of a file
SAID: dict[str, dict[str, Any]] = {
    "loftq": {"residual_base": True},
    "moe-gpt-oss-square-down": {"expert_lora_a": "first"},
    "moe-gpt-oss-square-down-peft-0-17-1": {"peft_version": "0.17.1"},
    "moe-gpt-oss-square-down-peft-0-19-0": {"expert_lora_a": "last"},
    "moe-v4-gpt-oss-square-down": {"expert_lora_a": "last"},
    "moe-unsloth-ambiguous": {"lora_b_layout": "grouped_by_expert"},
}


@dataclass(frozen=True)
class Case:
    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.path / "case.json").read_text())
        return facts

    @cached_property
    def config(self) -> dict[str, Any]:
        found = sorted(self.path.glob("**/adapter_config.json"), key=lambda p: len(p.parts))
        config: dict[str, Any] = json.loads(found[0].read_text()) if found else {}
        return config

    @property
    def refused(self) -> bool:
        return bool(self.facts.get("refused"))

    @property
    def kind(self) -> str:
        return str(self.config.get("peft_type", ""))

    @property
    def base(self) -> Path:
        """The base that it fits: LoftQ's can only be merged into what the quantisation left."""
        return BASES / str(self.facts["residual_base"] if self.given.residual_base else self.facts["base"])

    @property
    def given(self) -> Given:
        """What the user has to say besides."""
        if self.name in SAID:
            return Given(**SAID[self.name])
        return Given(initial=initial(self.path / "initial")) if (self.path / "initial").exists() else Given()

    @property
    def is_network(self) -> bool:
        return (self.base / "network.json").exists()

    @cached_property
    def expected(self) -> Any:
        with np.load(self.path / "expected.npz") as file:
            return file["outputs" if self.is_network else "logits"]

    @cached_property
    def inputs(self) -> torch.Tensor:
        with np.load(self.path / "expected.npz") as file:
            return torch.from_numpy(file["inputs" if self.is_network else "input_ids"])


def cases(*kinds: str) -> list[Case]:
    found = [Case(path.parent.name) for path in sorted(ROOT.glob("*/case.json"))]
    return [case for case in found if case.kind in kinds]


def network(path: Path) -> Any:
    """The model whose weights and config lie in a directory, float32, eager; every weight of it comes from there."""
    if (path / "network.json").exists() or not (path / "config.json").exists():
        import networks

        description = json.loads((path / "network.json").read_text())
        net = networks.build(description)
        net.load_state_dict(load_file(path / "model.safetensors"))
        return net.eval()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model, said = getattr(transformers, architecture).from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {what: keys for what, keys in said.items() if keys}
    assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def outputs(model: Any, inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    made = model(inputs) if inputs.is_floating_point() else model(input_ids=inputs).logits
    made = made[:, -1:] if made.ndim == 3 and not inputs.is_floating_point() else made  # which all tokens reach
    array: np.ndarray[Any, Any] = made.float().numpy()
    return array


def of_peft(adapter: Path, case: Case) -> Any:
    """The adapter on its base as PEFT loads it; it must find a value for each of its weights, and use all there are."""
    from peft import PeftConfig, PeftModel

    model = network(case.base)
    rows = json.loads((adapter / "adapter_config.json").read_text())
    assert rows["peft_type"]
    if vocabulary := case.facts.get("vocabulary"):
        model.resize_token_embeddings(vocabulary)
    torch.manual_seed(3)
    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    peft = PeftModel(model, config)
    found = peft.load_adapter(str(adapter), "default", is_trainable=False)
    wanted = {key for key in found.missing_keys if any(mark in key for mark in peft_marks(config.peft_type.value))}
    assert not wanted, wanted
    assert not found.unexpected_keys, found.unexpected_keys
    return peft.eval()


def peft_marks(kind: str) -> tuple[str, ...]:
    """What a key of that method's weights has in it."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return (*(v for k, v in PEFT_TYPE_TO_PREFIX_MAPPING.items() if k.value == kind), "modules_to_save", "token_adapter")


@cache
def merged_outputs(out: Path, case: Case) -> Any:
    return outputs(network(out), case.inputs)


# What the README's table says, in its order: a row for the cases whose names match. Each case is in exactly one.
ROWS = [
    (
        "LoRA, rsLoRA, DoRA; patterns; every `init_lora_weights` that leaves the base alone",
        r"dora|rslora-dora|rank-patterns|patterns-overlap|named-adapter|lora-bias|gaussian|orthogonal|mica|"
        r"eva|(lora|dora)-peft-.*",
    ),
    (
        "PiSSA, OLoRA, KaSA on the original base",
        r"pissa|pissa-(rslora|gpt2|bf16)|olora|kasa",
    ),
    (
        "PiSSA, OLoRA converted to plain LoRA",
        r"(pissa|olora)-converted",
    ),
    (
        "CorDA, LoRA-GA, randomised PiSSA with the initial adapter; LoftQ on its residual base",
        r"corda|lora-ga|pissa-niter|loftq",
    ),
    (
        "`modules_to_save`, resized vocabulary, saved embeddings",
        r"modules-to-save.*|resized-.*",
    ),
    (
        "`bias` = all and lora_only",
        r"bias-.*",
    ),
    (
        "`trainable_token_indices`, TRAINABLE_TOKENS",
        r"token-rows.*",
    ),
    (
        "LoRA and DoRA of embeddings and heads, tied or not; `ensure_weight_tying`",
        r"lora-(embed|head)-.*|dora-embed|tied-.*",
    ),
    (
        "`nn.MultiheadAttention`",
        r"mha",
    ),
    (
        "`layer_replication`",
        r"layer-replication.*",
    ),
    (
        "BD-LoRA, QALoRA",
        r"bd-lora.*|qalora",
    ),
    (
        "VeLoRA, MonteCLoRA",
        r"velora|monteclora",
    ),
    (
        "experts by `target_parameters` (Mixtral, Qwen3-MoE, Qwen3.5-MoE, DeepSeek-V3, gpt-oss, Llama 4, Granite-MoE)",
        r"moe-(mixtral|qwen3|qwen3-5|deepseek|gpt-oss|llama4|granite)(?!.*-peft-).*",
    ),
    (
        "the same by PEFT 0.17 to 0.19",
        r"moe-(?!v4).*-peft-.*",
    ),
    (
        "experts as layers of their own (transformers 4), LoRA and DoRA",
        r"moe-v4-.*",
    ),
    (
        "experts in Unsloth's order",
        r"moe-unsloth-.*",
    ),
    (
        "LoHa",
        r"loha.*",
    ),
    (
        "LoKr",
        r"lokr.*",
    ),
    (
        "VeRA, PVeRA",
        r"p?vera.*",
    ),
    (
        "IA³",
        r"ia3.*",
    ),
    (
        "AdaLoRA",
        r"adalora.*",
    ),
    (
        "OFT, BOFT, HRA",
        r"b?oft.*|hra.*",
    ),
    (
        "RandLoRA, VB-LoRA, GraLoRA, DeLoRA, MiSS and Bone",
        r"(randlora|vblora|gralora|delora|miss|bone).*",
    ),
    (
        "FourierFT, WaveFT, C3A, SHiRA",
        r"(fourierft|waveft|c3a|shira).*",
    ),
    (
        "HiRA, RoAD, LN tuning, BEFT",
        r"(hira|road|ln-tuning|beft).*",
    ),
    (
        "LyCORIS's LoHa and LoKr, with DoRA too",
        r"lycoris.*",
    ),
    (
        "aLoRA, Arrow, X-LoRA, Poly",
        r"alora|arrow|xlora|poly",
    ),
    (
        "prompt methods",
        r"(prompt|prefix)-tuning",
    ),
    (
        "convolutions in groups",
        r"grouped-conv",
    ),
]


def table() -> str:
    """The README's table of what PEFT saves, from the cases that the tests run."""
    every = [Case(path.parent.name) for path in sorted(ROOT.glob("*/case.json"))]
    left = {case.name for case in every}
    lines = ["| what | cases | by PEFT | merged | written back |", "|---|---|---|---|---|"]
    for title, pattern in ROWS:
        members = [case for case in every if re.fullmatch(pattern, case.name)]
        assert members, title
        left -= {case.name for case in members}
        versions = sorted({version_of(case) for case in members}, key=lambda v: [int(n) for n in v.split(".")])
        span = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
        refused = all(case.refused for case in members)
        again = [case for case in members if RELOADED.get(case.name)]
        merged = "refused by name" if refused else "as trained" + f", {len(again)} as PEFT reloads it" * bool(again)
        lines.append(f"| {title} | {len(members)} | {span} | {merged} | {'–' if refused else written(members)} |")
    assert not left, left
    return "\n".join(lines)


def written(members: list[Case]) -> str:
    kinds = {case.kind for case in members}
    if "" in kinds:  # no PEFT adapters
        return "–"
    files = sum(case.name in OLD_LAYERS or case.name in LOST for case in members)
    return f"yes, {files} as files only" if files else "yes"


def version_of(case: Case) -> str:
    versions = case.facts["versions"]
    return str(versions.get("lycoris_lora", versions.get("peft", "")))


# cases whose file does not say what was trained
RELOADED = {
    "patterns-overlap": "PEFT sorts its patterns when it saves",
    "bias-lora-only-peft-0-12-0": "the trained biases are not in the file",
}

# of another PEFT, and the newest has no such method any more, or reads the same file as something else
LOST = {"boft-2", "oft-peft-0-12-0", "oft-share-peft-0-12-0", "oft-peft-0-15-2", "oft-peft-0-17-1"}

# cases that PEFT cannot load, or reads wrongly, under transformers 5: experts that were layers of their own
OLD_LAYERS = {
    "moe-v4-deepseek": "it drops the adapters of dense layers",
    "moe-v4-deepseek-dora": "it has no DoRA of stacked experts",
    "moe-v4-mixtral-dora": "it has no DoRA of stacked experts",
    "moe-v4-qwen3-dora": "it has no DoRA of stacked experts",
    "moe-v4-mixtral-some": "it wants all experts, of one rank",
    "moe-v4-mixtral-w1": "it wants w3 where there is w1",
}
