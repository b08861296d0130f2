"""Which output head shares the input embedding's weight, and which models store linear weights as (in, out).

Facts of the architectures, as transformers declares them (``_tied_weights_keys``; layers of type ``Conv1D``).
"""

from __future__ import annotations

# Parameter suffix of the input embedding → the head tied to it, in order of preference: (embedding, head).
TIED_HEADS = (
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ("shared.weight", "lm_head.weight"),
)

# Models whose heads cannot be untied by configuration: transformers ties them whatever config.json says.
ALWAYS_TIED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})

# Endings of the architectures (config.json) that have such a head.
LANGUAGE_MODELS = (
    "ForCausalLM",
    "LMHeadModel",
    "DoubleHeadsModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
)

# Weights with one row for each label of a classification model.
LABEL_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")

# Models with transformers' Conv1D layers, whose weights are stored (in, out).
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
