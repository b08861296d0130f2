"""PEFT's other methods that change weights: what each makes of a module's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...adapter import Update
from ...checkpoint import Checkpoint
from ...errors import InputError, UsageError
from .. import Given
from . import drawn, products, rotations, transforms
from .keys import Keys
from .source import Source


@dataclass(frozen=True, slots=True)
class Method:
    """``leaves``: its keys, ``leaf`` or ``leaf.bias``; ``begins``: whether a segment of a key is a leaf at all."""

    leaves: frozenset[str]
    begins: Callable[[str], bool]
    read: Callable[[Checkpoint, Mapping[str, Any], Keys, Given, list[str]], list[Update]]
    only_training: frozenset[str] = frozenset()


def _method(start: str, leaves: str, read: Callable[[Source], list[Update]], only_training: str = "") -> Method:
    """A method whose leaves begin with ``start``; ``leaves`` go on from there, or with @ are whole names."""
    names = frozenset(name.removeprefix("@") if name[0] == "@" else start + name for name in leaves.split())
    training = frozenset(only_training.split())

    def begins(segment: str) -> bool:
        return segment.startswith(start) or segment in training

    def updates(
        checkpoint: Checkpoint, config: Mapping[str, Any], keys: Keys, given: Given, notes: list[str]
    ) -> list[Update]:
        if (given.alpha, given.scaling, given.scale_rule) != (None, None, None):
            kind = config["peft_type"]
            raise UsageError(
                f"--alpha, --scaling and --scale-rule are for LoRA; a {kind} adapter says its own scaling."
            )
        source = Source(checkpoint, config, keys, given, notes)
        made = read(source)
        held = [*keys.shared.values(), *(key for module in keys.modules.values() for key in module.parts.values())]
        unused = [key for key in held if key not in source.used]
        if unused:
            raise InputError(f"{unused[0]} does not go with the other tensors of its module, which leave it no part.")
        return made

    return Method(names, begins, updates, training)


_LOKR = "w1 w1_a w1_b w2 w2_a w2_b t2"
_LOGITS = "logits_A logits_B logits_A_topk_weights logits_A_topk_indices logits_B_topk_weights logits_B_topk_indices"
METHODS: dict[str, Method] = {
    "ADALORA": _method("lora_", "A B E", products.adalora, "ranknum"),
    "BEFT": _method("beft_", "bias", transforms.beft),
    "BOFT": _method("boft_", "R s P", rotations.boft),
    "BONE": _method("bone_", "block", partial(transforms.miss, leaf="bone_block")),
    "C3A": _method("c3a_", "kernel", drawn.c3a),
    "DELORA": _method("delora_", "A B lambda w_norm", products.delora),
    "FOURIERFT": _method("fourierft_", "spectrum", drawn.fourierft),
    "GRALORA": _method("gralora_", "A B A_general B_general", products.gralora),
    "HIRA": _method("hira_", "A B embedding_A embedding_B", transforms.hira),
    "HRA": _method("hra_", "u", rotations.hra),
    "IA3": _method("ia3_", "l", transforms.ia3),
    "LN_TUNING": _method("ln_tuning_layers", "@ln_tuning_layers @ln_tuning_layers.bias", transforms.ln_tuning),
    "LOHA": _method("hada_", "w1_a w1_b w2_a w2_b t1 t2", products.loha),
    "LOKR": _method("lokr_", _LOKR, products.lokr),
    "MISS": _method("miss_", "block", transforms.miss),
    "OFT": _method("oft_", "R r s embedding_R", rotations.oft),
    "PVERA": _method("pvera_", "lambda_b lambda_d A B", partial(drawn.vera, name="pvera")),
    "RANDLORA": _method("randlora_", "lambda gamma A B", drawn.randlora),
    "ROAD": _method("road_", "theta alpha", transforms.road),
    "SHIRA": _method("shira_", "weight indices", drawn.shira),
    "VBLORA": _method("vblora_", f"vector_bank {_LOGITS}", products.vblora),
    "VERA": _method("vera_", "lambda_b lambda_d A B", drawn.vera),
    "WAVEFT": _method("waveft_", "spectrum", drawn.waveft),
}
