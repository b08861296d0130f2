"""Tiny models with random weights, adapters that PEFT trains on them, and what PEFT makes of both: the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]

# No two sizes of a model are equal where its architecture lets them differ, so that a mixed-up axis shows.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# family → (model class, sizes); the config class follows from the model class
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 12}),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 12}),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", {**SIZES, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "bert": ("BertForMaskedLM", SIZES),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": 160, "d_model": 32, "d_ff": 56, "d_kv": 12, "num_layers": 2, "num_heads": 4},
            **{"pad_token_id": 0, "decoder_start_token_id": 0},
        },
    ),
    "mamba": ("MambaForCausalLM", {"vocab_size": 160, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 3}),
    "llama-classifier": ("LlamaForSequenceClassification", GROUPED),
    "bert-classifier": ("BertForSequenceClassification", SIZES),
}


@dataclass(frozen=True)
class Case:
    """One adapter: the family and settings of its base, and the arguments of PEFT's LoraConfig."""

    family: str
    lora: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    headless: bool = False  # the base's files hold the inner model only, under names without its prefix
    vocabulary: int | None = None  # trained on a base resized to so many tokens
    shared: bool = False  # two layers share one weight, and PEFT's merge puts every update into both

    @property
    def model_class(self) -> Any:
        return getattr(transformers, FAMILIES[self.family][0])

    @property
    def key(self) -> str:
        """Cases with the same key have the same base."""
        return "-".join([self.family, *(f"{k}={v}" for k, v in self.config.items()), "headless" * self.headless])

    def load(self, folder: Path) -> Any:
        """The model in ``folder`` in its own dtype, by its own config."""
        return self.model_class.from_pretrained(folder, dtype="auto").eval()

    def load_base(self, folder: Path) -> Any:
        """The base made ready for the adapter: resized, or given a new head of three labels."""
        labels = {"num_labels": 3} if "classifier" in self.family else {}
        model = self.model_class.from_pretrained(folder, dtype="auto", **labels)
        if self.vocabulary:
            model.resize_token_embeddings(self.vocabulary)
        return model.eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Fixed random tokens, with labels to train on."""
        ids = torch.randint(3, 160, (2, 12), generator=torch.Generator().manual_seed(5))
        return {"input_ids": ids, "labels": torch.tensor([0, 2]) if "classifier" in self.family else ids}

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """What the model says of the fixed tokens."""
        result: torch.Tensor = model(**self.inputs()).logits
        return result


def randomised(module: torch.nn.Module, std: float = 0.1) -> Any:
    """Move every parameter by seeded noise: no zero biases, no norms of one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return module


class Zoo:
    """Bases and adapters on disk, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = cache(self._adapter)
        self.base = cache(self._base)

    def _base(self, name: str, dtype: str = "float32") -> Path:
        case = CASES[name]
        folder = self.root / f"base-{case.key}-{dtype}"
        if not folder.exists():
            torch.manual_seed(1)
            sizes = {**FAMILIES[case.family][1], **case.config}
            model = randomised(case.model_class(case.model_class.config_class(**sizes)))
            model.to(getattr(torch, dtype))
            size = "30KB" if dtype == "float32" else "15KB"
            (model.base_model if case.headless else model).save_pretrained(folder, max_shard_size=size)
            if case.family == "gpt2" and case.headless:  # so it is on the hub
                model.config.architectures = ["GPT2LMHeadModel"]
                model.config.save_pretrained(folder)
            assert len(list(folder.glob("model-*.safetensors"))) > 2, "a base of several shards"
        return folder

    def _adapter(self, name: str, dtype: str = "float32") -> Path:
        """The directory of an adapter that PEFT trained for three steps, on the base in this dtype, and saved."""
        case = CASES[name]
        folder = self.root / f"{name}-{dtype}"
        torch.manual_seed(2)
        model = case.load_base(self.base(name, dtype))
        trained = train(get_peft_model(model, LoraConfig(**case.lora)), case.inputs())
        trained.save_pretrained(folder)
        return folder


def train(model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Three steps of Adam. Every adapter tensor must have moved."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        result = model(**inputs)
        (result.loss if hasattr(result, "loss") else result.square().mean()).backward()
        optimizer.step()
    still = [name for name, p in parameters.items() if torch.equal(p, before[name]) and "lora_" in name]
    assert not still, f"these did not train: {still}"
    return model


def with_adapter(case: Case, base: Path, adapter: Path) -> Any:
    """The adapter on its base, freshly loaded by PEFT in the base's dtype."""
    return PeftModel.from_pretrained(case.load_base(base), adapter).eval()


def stored(folder: Path) -> Tensors:
    """All tensors of a directory (or file) of safetensors."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable 16-bit numbers lie between the elements of two tensors."""

    def place(t: torch.Tensor) -> torch.Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


def assert_merged_alike(
    ours: Tensors, theirs: Tensors, base: Mapping[str, torch.Tensor], differing: float = 1e-4
) -> set[str]:
    """The numerics contract, over every tensor; gives back the names that differ from the base.

    What the oracle left as it was must be so bit for bit. Float32: within 1e-6 of the row's largest element. 16 bits:
    at most 1 ulp apart, and 99.99 % identical. Where W and its update cancel, float32's own rounding is several ulps of
    the little that remains, but nothing beside the row's largest element.
    """
    assert ours.keys() == theirs.keys()
    changed, elements, different = set(), 0, 0
    for name, their in theirs.items():
        our = ours[name]
        assert (our.shape, our.dtype) == (their.shape, their.dtype), name
        if name in base and torch.equal(their, base[name]):
            assert torch.equal(our, their), f"{name} should be the base's"
            continue
        changed.add(name)
        a, b = (t.double().reshape(len(t), -1) for t in (our, their))
        apart = (a - b).abs() / b.abs().amax(1, keepdim=True)
        if our.dtype == torch.float32:
            assert float(apart.max()) <= 1e-6, f"{name}: {float(apart.max()):.2g} of its row's largest element"
        else:
            far = int((ulps(our, their).reshape(len(our), -1) > 1).logical_and(apart > 1e-7).sum())
            assert not far, f"{name}: {far} elements are more than 1 ulp apart"
            elements, different = elements + apart.numel(), different + int((our != their).sum())
    assert different <= differing * elements, f"{different} of {elements} elements differ"
    return changed


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float, control: torch.Tensor | None = None) -> None:
    """|a − b| within ``tolerance`` of the largest |b|; the ``control`` must be a thousand times farther away."""
    scale = float(b.abs().max())
    error = float((a - b).abs().max()) / scale
    assert error <= tolerance, f"{error:.2g} of the scale {scale:.3g}"
    if control is not None:
        distance = float((control - b).abs().max()) / scale
        assert distance > max(1000 * error, 0.01), f"the base is only {distance:.2g} away, the merged model {error:.2g}"


def _cases() -> Iterable[tuple[str, Case]]:
    """Every architecture with every linear layer adapted, and every feature of PEFT's LoRA on an architecture it fits.

    ``llama`` is untied and ``tied`` is the same model with its head tied to its embedding.
    """
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    dora = {**lora, "use_dora": True}
    some = {**lora, "target_modules": ["q_proj", "down_proj"]}
    tied = {"tie_word_embeddings": True}
    for family in FAMILIES:
        if "classifier" not in family and family != "mamba":
            # transformers 5 fuses experts into one parameter, which DoRA cannot adapt
            targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} if family == "mixtral" else {}
            yield f"{family}-lora", Case(family, {**lora, **targets})
            yield f"{family}-dora", Case(family, {**dora, **targets})
    yield "rslora", Case("llama", {**lora, "use_rslora": True})
    yield (
        "patterns",
        Case(
            "llama",
            {
                **dora,
                "rank_pattern": {r"layers.\d.self_attn.q_proj": 6, "^model.layers.0.mlp.up_proj": 2, "absent": 3},
                "alpha_pattern": {"q_proj": 24, r"1\..*\.q_proj": 2, "^model.layers.1.mlp.up_proj": 1.5, "mlp": 90},
            },
        ),
    )
    yield "lora_bias", Case("qwen2", {**lora, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]})
    yield "bias=all", Case("gpt_neox", {**lora, "bias": "all"})
    yield "bias=all-bert", Case("bert", {**lora, "bias": "all"})
    yield "bias=lora_only", Case("gpt2", {**dora, "bias": "lora_only"})
    for where, config in (("untied", {}), ("tied", tied)):
        shared = where == "tied"
        for method, extra in (("lora", {}), ("dora", {"use_dora": True})):
            options = {**some, **extra}
            for target in ("embed_tokens", "lm_head"):
                targets = {**options, "target_modules": ["q_proj", target]}
                yield f"{target}-{method}-{where}", Case("llama", targets, config, shared=shared)
        saves = {**some, "modules_to_save": ["lm_head"]}
        yield f"saved-head-{where}", Case("llama", saves, config, shared=shared)
        yield f"resized-{where}", Case("llama", some, config, vocabulary=167)
        both = {**some, "modules_to_save": ["embed_tokens", "lm_head"]}
        yield f"resized-saved-{where}", Case("llama", both, config, vocabulary=167, shared=shared)
    # scaled embeddings, other kinds of heads, and files without the prefix that the head's name does not share
    yield (
        "embed_tokens-gemma3-tied",
        Case("gemma3", {**dora, "target_modules": ["q_proj", "embed_tokens"]}, shared=True),
    )
    mamba = {"tie_word_embeddings": True}
    yield "embeddings-mamba-tied", Case("mamba", {**lora, "target_modules": ["embeddings"]}, mamba, shared=True)
    yield "lm_head-gpt_neox", Case("gpt_neox", {**lora, "target_modules": ["query_key_value", "lm_head"]})
    inner = {**lora, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "embed_tokens"]}
    yield "embed_tokens-headless", Case("llama", inner, tied, headless=True, shared=True)
    words = {**lora, "target_modules": ["query", "word_embeddings"]}
    yield "word_embeddings-bert-tied", Case("bert", words, shared=True)
    yield "wte-gpt2-tied", Case("gpt2", {**dora, "target_modules": ["c_fc", "wte"]}, headless=True, shared=True)
    yield "gpt2-headless", Case("gpt2", {**dora, "target_modules": ["c_attn", "c_fc", "c_proj"]}, headless=True)
    yield "llama-headless", Case("llama", dora, tied, headless=True)
    for family in ("llama", "bert"):
        yield f"{family}-classifier", Case(f"{family}-classifier", {**dora, "task_type": "SEQ_CLS"}, headless=True)


CASES = dict(_cases())
