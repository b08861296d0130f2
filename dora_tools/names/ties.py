"""Which parameters of an architecture are one and the same, and which models store linear weights as (in, out).

Facts of the architectures as transformers declares them. ``ties.json`` is made by fixtures/make_ties.py from the
``_tied_weights_keys`` of its language models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

# Models with transformers' Conv1D layers, whose weights are stored (in, out), and what those layers are called.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

# Models whose layers of experts say that their stacked weights are (expert, in, out), transformers' is_transposed.
TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})

# What embeddings are called in transformers' models.
EMBEDDING_NAME = re.compile(r"emb|^wte$|^wpe$|^shared$|^relative_attention_bias$")

# Where the language model stands in a multimodal one: transformers 5's names, and those of older files.
MOVED = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))

# Segments of the heads that are put on a model for a task, which its own checkpoint does not have.
TASK_HEADS = frozenset(
    {
        "score",
        "classifier",
        "qa_outputs",
        "classification_head",
        "pre_classifier",
        "pooler",
        "projector",
        "v_head",
        "value_head",
    }
)

# Weights with one row for each label of a classification model.
LABEL_HEADS = tuple(
    f".{head}.weight" for head in ("score", "classifier", "classifier.out_proj", "classification_head.out_proj")
)

# What replaces "Model" in an architecture's name when a language head is put on it, by PEFT's task types.
HEADED = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForMaskedLM", "ForPreTraining", "Generation")


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files(__package__) / "ties.json").read_text())
    return table


def ties_of(architecture: str, task: str | None = None) -> Mapping[str, str] | None:
    """Tied parameter → the parameter that it is, in this architecture, or in the one that ``task`` makes of it.

    Empty where nothing is tied or there is no head; None for a language model that transformers does not have.
    """
    stem = architecture.removesuffix("Model")
    headed = [stem + ending for ending in HEADED.get(task or "", ())] if stem != architecture else []
    for row in _table()["ties"]:
        if architecture in row["architectures"] or any(name in row["architectures"] for name in headed):
            tied: Mapping[str, str] = row["tied"]
            return tied
    return None if architecture.endswith(LANGUAGE_MODELS) else {}


@cache
def _tied_leaves() -> frozenset[str]:
    pairs = (pair for row in _table()["ties"] for pair in row["tied"].items())
    return frozenset(".".join(name.split(".")[-2:]) for pair in pairs for name in pair)


def may_be_tied(name: str) -> bool:
    """Whether some architecture ties a parameter of that name to another."""
    return ".".join(name.split(".")[-2:]) in _tied_leaves()


def always_tied(model_type: str | None) -> bool:
    """Whether transformers ties this model whatever config.json says."""
    return model_type in _table()["always"]
