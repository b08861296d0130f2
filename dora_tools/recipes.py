"""Which stored type each tensor of a GGUF file gets when a user asks for a mix such as ``q4_k_m``.

A mix has one type for most tensors and exceptions for those that suffer most: values and down projections in some of
the blocks, the output, models with few key-value heads or eight experts. The tables follow what llama.cpp's
llama-quantize does without an importance matrix; what they say is compared with what it wrote (fixtures/expected/
recipes.json). Rows that a type's blocks do not divide get a type of smaller blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from .dtypes import DTYPES
from .errors import TargetError, UsageError

_TABLE = (
    *(("f32", 0, "F32"), ("f16", 1, "F16"), ("bf16", 32, "BF16"), ("q8_0", 7, "Q8_0")),
    *(("q4_0", 2, "Q4_0"), ("q4_1", 3, "Q4_1"), ("q5_0", 8, "Q5_0"), ("q5_1", 9, "Q5_1")),
    *(("q2_k", 10, "Q2_K"), ("q3_k_s", 11, "Q3_K"), ("q3_k_m", 12, "Q3_K"), ("q3_k_l", 13, "Q3_K")),
    *(("q4_k_s", 14, "Q4_K"), ("q4_k_m", 15, "Q4_K"), ("q5_k_s", 16, "Q5_K"), ("q5_k_m", 17, "Q5_K")),
    *(("q6_k", 18, "Q6_K"), ("iq4_nl", 25, "IQ4_NL"), ("iq4_xs", 30, "IQ4_XS")),
)  # mix, its number as general.file_type, the type of most tensors
MIXES: Mapping[str, str] = {mix: kind for mix, _, kind in _TABLE}
FILE_TYPES: Mapping[str, int] = {mix: number for mix, number, _ in _TABLE}
_OWN_RULES = ("glm5-next",)  # architectures with rules that are not here
_BLOCKS_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
NEED_IMPORTANCE = frozenset(["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"])


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model. Heads are those of its first block, where they differ from block to block.

    ``blocks`` is ``block_count`` of the metadata, blocks for the prediction of further tokens included.
    """

    architecture: str
    blocks: int
    heads: int
    heads_kv: int
    experts: int = 0

    @property
    def few_kv_heads(self) -> bool:
        """Whether four or more heads share their keys and values."""
        return self.heads_kv > 0 and self.heads // self.heads_kv >= 4

    @property
    def size_70b(self) -> bool:
        """Whether llama.cpp counts it among the 70B models, which it knows by the number of blocks."""
        grouped = self.heads != self.heads_kv or self.architecture not in ("llama", "llama-embed")
        return grouped and _BLOCKS_70B.get(self.architecture) == self.blocks


_CONDITIONS: Mapping[str, Callable[[int, int, Model], bool]] = {
    "": lambda index, count, model: True,
    "few kv heads": lambda index, count, model: model.few_kv_heads,
    "first 2": lambda index, count, model: index < 2,
    "first 4": lambda index, count, model: index < 4,
    "first 16th": lambda index, count, model: index < count // 16,
    "first 8th": lambda index, count, model: index < count // 8,
    "ends and thirds": lambda i, count, model: i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2,
}  # asked with the index of the tensor, or of its block, among so many

Exceptions = Mapping[str, Mapping[str, str]]  # mix → condition → type; the first condition that holds counts
_SPREAD, _EARLY = {"ends and thirds": "Q6_K"}, {"first 8th": "Q5_K"}
_FEW, _FIVE, _EIGHT = {"few kv heads": "Q5_K"}, {"": "Q5_K"}, {"": "Q8_0"}
_VALUES: Exceptions = {
    "q2_k": {"few kv heads": "Q4_K", "": "Q3_K"},
    "q3_k_m": {"first 2": "Q5_K", "": "Q4_K"},
    "q4_k_s": {"first 4": "Q5_K"},
    **{"q3_k_l": _FIVE, "q4_k_m": _SPREAD, "q5_k_m": _SPREAD, "iq4_nl": _FEW, "iq4_xs": _FEW},
}
_OUTPUT: Exceptions = {"q2_k": {"": "Q3_K"}, "q3_k_m": {"": "Q4_K"}, "q3_k_l": _FIVE}
_DOWN: Exceptions = {
    "q2_k": {"": "Q3_K"},
    "q3_k_m": {"first 16th": "Q5_K", "": "Q4_K"},
    **{"q3_k_l": _FIVE, "q4_k_s": _EARLY, "q4_k_m": _SPREAD},
    **{"q5_k_m": _SPREAD, "iq4_nl": _EARLY, "iq4_xs": _EARLY},
}
_FALCON_DOWN: Exceptions = {
    **_DOWN,
    "q3_k_m": {"first 16th": "Q5_K", "ends and thirds": "Q4_K"},
    "q3_k_l": {"": "Q4_K"},
    "q4_k_s": {},
    "q4_k_m": {"first 16th": "Q6_K", "ends and thirds": "Q5_K"},
}
_RULES = {"values": _VALUES, "attn_output": _OUTPUT, "ffn_down": _DOWN}
_FALCON = {"values": _VALUES, "attn_output": {"q3_k_l": {"": "Q4_K"}}, "ffn_down": _FALCON_DOWN}
_EIGHT_EXPERTS: Mapping[str, Exceptions] = {
    "values": {mix: _EIGHT for mix in MIXES},
    "attn_k": {mix: _EIGHT for mix in MIXES},
    "attn_output": {mix: _FIVE for mix in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")},
    "ffn_down": _DOWN,
}
_PARTS = (
    ("values", ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")),
    ("attn_k", ("attn_k.weight",)),
    ("other", ("attn_q.weight",)),
    ("attn_output", ("attn_output.weight",)),
    ("other", ("ffn_up", "ffn_gate")),
    ("ffn_down", ("ffn_down",)),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

# Norms, routers, positions, convolutions and other small ones keep the type that they have.
_KEPT = re.compile(
    r"^(position_embd|token_types)\.weight$|(_norm|ffn_gate_inp|ffn_gate_tid2eid|shortconv\.conv|attn_rel_b)\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight|altup|laurel"
    r"|per_layer_model_proj|ssm_conv1d|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)


def types_of(mix: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], model: Model) -> dict[str, str]:
    """The type that each tensor gets: name → (stored type, shape with the row length last) → name → type.

    Give it all tensors of the model, those of every split file: whether there is an ``output.weight`` and how many
    value projections there are decides about others. Raises UsageError for a mix that is not known, and TargetError
    for one that needs an importance matrix, or an architecture with rules of its own.
    """
    usual = _usual_type(mix)
    if model.architecture in _OWN_RULES:
        raise TargetError(f"{model.architecture} has rules of its own; write f16 and run llama-quantize on that.")
    rules = _EIGHT_EXPERTS if model.experts == 8 else _FALCON if model.architecture == "falcon" else _RULES
    tied = "output.weight" not in tensors
    values = sum(_part(name) == "values" for name in tensors)
    seen: Counter[str] = Counter()
    found = {name: stored for name, (stored, _) in tensors.items()}
    for name in sorted((n for n, (_, shape) in tensors.items() if _is_quantised(n, shape)), key=_place):
        width, part = tensors[name][1][-1], _part(name)
        if name == "output.weight" or (tied and name in _EMBEDDINGS):
            eight_bits = model.architecture == "falcon" or width % DTYPES[usual].block or usual == "Q8_0"
            kind = "Q8_0" if eight_bits else "Q6_K"
        else:
            index = _place(name)[0] if part == "ffn_down" and model.experts > 1 else seen[part]
            seen[part] += 1
            count = values if part == "values" else model.blocks
            exceptions = rules.get(part, {}).get(mix, {})
            kind = next((k for asked, k in exceptions.items() if _CONDITIONS[asked](index, count, model)), usual)
            if part == "values" and model.size_70b and kind in ("Q3_K", "Q4_K"):
                kind = "Q5_K"
        found[name] = usual if DTYPES[usual].block == 1 else _fitting(kind, width)
    return found


def named(mix: str) -> str:
    """A mix as ``MIXES`` spells it: in lower case, and q4_k as llama-quantize takes it, q4_k_m."""
    mix = mix.lower()
    return f"{mix}_m" if f"{mix}_m" in MIXES else mix


def _usual_type(mix: str) -> str:
    if mix in NEED_IMPORTANCE:
        raise TargetError(
            f"{mix} needs an importance matrix, without which its weights are useless, and dora-tools makes none. "
            "Write f16 or f32, and run llama.cpp's llama-quantize with --imatrix on that."
        )
    if mix not in MIXES:
        raise UsageError(f"'{mix}' is not a mix of types that is known; use one of {', '.join(MIXES)}.")
    return MIXES[mix]


def _place(name: str) -> tuple[int, str]:
    """Where a tensor stands when llama-quantize counts: by block, then by name."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def _part(name: str) -> str:
    return next((part for part, pieces in _PARTS if any(piece in name for piece in pieces)), "other")


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the mix applies at all: to matrices of weights, of more than one row."""
    return name.endswith("weight") and prod(shape[:-1]) > 1 and not _KEPT.search(name)


def _fitting(kind: str, width: int) -> str:
    """The type itself, or one of smaller blocks where rows of this width are no whole number of blocks."""
    if width % DTYPES[kind].block:
        kind = _SMALLER.get(kind, kind)
    return "F16" if width % DTYPES[kind].block else kind
