"""Whether shapes agree, which way round the base stores each matrix, and what the config says of sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod

from ..adapter import Unchanged, Update
from ..checkpoint import Checkpoint, TensorInfo, Tensors, ref
from ..deltas import Tokens
from ..dtypes import DTYPES
from ..errors import FitError, UnsupportedError
from ..names.ties import CONV1D_LAYERS, CONV1D_MODELS, LABEL_HEADS
from .plan import Bound, Plan, set_setting, setting


def fit_vocabulary(plan: Plan) -> None:
    """A replacement of the base's shape, or of another number of rows where that is the vocabulary."""
    old = setting(plan.config, "vocab_size")
    vocabulary = {name for pair in (plan.ties or {}).items() for name in pair}
    heads = {name for name in plan.replaced if f".{name}".endswith(LABEL_HEADS)}
    for name, replacement in plan.replaced.items():
        info = plan.base.tensors.get(name)
        found = replacement.tensor.shape
        if info is not None and not DTYPES[info.dtype].floating and DTYPES[replacement.tensor.dtype].floating:
            raise FitError(f"{name} is stored as {info.dtype} in {info.file}; {replacement.tensor.key} has fractions.")
        if info is None or info.shape == found:
            continue
        if name.removesuffix("bias").removesuffix("weight") + "weight" in heads and info.shape[1:] == found[1:]:
            continue
        if (
            not found
            or not info.shape
            or info.shape[1:] != found[1:]
            or (info.shape[0] != old and name not in vocabulary)
        ):
            raise FitError(
                f"{replacement.tensor.key} replaces {name} and has shape {list(found)}, but the base's, in "
                f"{info.file}, has {list(info.shape)}. Is this the right base model?{plan.trained_on}"
            )
        if setting(plan.config, "vocab_size") != found[0]:
            set_setting(plan.config, "vocab_size", found[0])
            plan.notes.append(f"{name} has {found[0]} rows, not {info.shape[0]}: vocab_size {old} becomes {found[0]}.")
    for tied, source in (plan.ties or {}).items():
        if (source in plan.replaced or tied in plan.replaced) and plan.knows(tied) and plan.knows(source):
            rows, others = plan.shape(source)[0], plan.shape(tied)[0]
            if rows != others:
                raise FitError(
                    f"{source} would have {rows} rows and {tied} {others}: the adapter resized only one of them, and "
                    "no config can describe that."
                )


def fit_labels(plan: Plan) -> None:
    """A classifier brings its number of labels, which the config must know to load it."""
    for name, replacement in plan.replaced.items():
        shape = replacement.tensor.shape
        if len(shape) != 2 or not f".{name}".endswith(LABEL_HEADS):
            continue
        labels = plan.config.get("id2label")
        labels = labels if isinstance(labels, dict) and labels else {"0": "LABEL_0", "1": "LABEL_1"}
        if len(labels) != shape[0] and plan.config:
            plan.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(shape[0])}
            plan.config["label2id"] = {f"LABEL_{i}": i for i in range(shape[0])}
            plan.notes.append(f"{name} has {shape[0]} labels: the config says so now, with names LABEL_0, LABEL_1, ….")


def replacements(plan: Plan, view: Checkpoint) -> Tensors:
    """The replacements as a checkpoint; those that are new take the base's commonest type and its last file."""
    floats = Counter(info.dtype for info in view.tensors.values() if DTYPES[info.dtype].floating)
    dtype = floats.most_common(1)[0][0] if floats else "F32"
    last = max((info.file for info in view.tensors.values()), default="model.safetensors")
    return Tensors({n: replace(r.tensor, dtype=dtype) for n, r in plan.replaced.items()}, last)


def orient(plan: Plan, view: Checkpoint) -> tuple[dict[str, tuple[Bound, ...]], dict[str, int]]:
    """Every update checked against the shape of its tensor and turned to it; and the row widths of conv weights."""
    bound: dict[str, tuple[Bound, ...]] = {}
    widths: dict[str, int] = {}
    turned = _turned_rule(plan, view)
    for name, updates in plan.updates.items():
        info = view.tensors[name]
        if not DTYPES[info.dtype].floating:
            raise UnsupportedError(
                f"{name} is stored as {info.dtype} in {info.file}: a quantised base. Give the base it was made from, "
                "or a dequantised copy."
            )
        bounds: list[Bound] = []
        for update, strength in updates:
            out, in_ = update.delta.shape
            stored = (info.shape[0], prod(info.shape[1:])) if len(info.shape) > 1 else (0, 0)
            if len(info.shape) > 2 and not update.kernel_size and prod(info.shape[2:]) != 1:
                stored = (0, 0)  # a stack of matrices: no linear layer
            if update.part is not None:
                first, last = update.part
                stored = (last - first, info.width) if 0 <= first < last <= info.rows else (0, 0)
            if isinstance(update.delta, Tokens):
                _check_tokens(update.delta, name, info)
            if update.kind == "whole":
                if out not in (-1, info.rows) and update.part is None:
                    raise FitError(_misfit_sentence(update, (out, in_), info, plan))
                delta = update.delta.onto(ref(view, name).reshape(info.rows, -1))
                bounds.append(Bound(update.module, delta, None, strength, part=update.part))
                continue
            turn = update.kind == "embedding" or (
                turned(update, stored)
                if update.kind == "linear"
                else update.kind == "expert" and _turned_expert(update, stored)
            )
            expected = (in_, out) if turn else (out, in_)
            conv_fits = not update.kernel_size or info.shape[1:] == update.kernel_size
            if not _fits(expected, stored) or not conv_fits:
                raise FitError(_misfit_sentence(update, expected, info, plan))
            if len(info.shape) > 2 and update.part is None:
                widths[name] = stored[1]
            magnitude = update.magnitude
            delta = update.delta.turned() if turn else update.delta
            matrix = ref(view, name).reshape(-1, stored[1])
            bounds.append(
                Bound(
                    update.module,
                    delta.onto(matrix.rows(slice(*update.part)) if update.part else matrix),
                    magnitude.turned() if magnitude and turn else magnitude,
                    strength,
                    turned=turn,
                    part=update.part,
                )
            )
        bound[name] = tuple(bounds)
    for name, on_weight in list(bound.items()):
        bias = name.removesuffix("weight") + "bias"
        followers = [
            Bound(b.module, Unchanged((view.tensors[bias].shape[0], 1)), None, b.strength, (name, i), part=b.part)
            for i, b in enumerate(on_weight)
            if b.magnitude is not None and b.magnitude.scales_bias and bias in view.tensors
        ]
        if followers:
            bound[bias] = (*bound.get(bias, ()), *followers)
    return bound, widths


def _turned_expert(update: Update, stored: tuple[int, int]) -> bool:
    """Whether the base stores the transpose of what an expert's factors make: by shape, else as the reader was told."""
    out, in_ = update.delta.shape
    if out != in_:
        return stored == (in_, out)
    if not update.told:
        raise UnsupportedError(
            f"{update.module} is square, so which of its axes lora_A is of is not told by shape, nor by what the file "
            "says of its PEFT. Say --expert-lora-a first (PEFT up to 0.18 always; later of models like gpt-oss under "
            "transformers 5) or last (PEFT since 0.19.1 of other models, and under transformers 4)."
        )
    return bool(update.transposed)


def _check_tokens(delta: Tokens, name: str, info: TensorInfo) -> None:
    if delta.shape[1] != info.width or max(delta.indices, default=0) >= info.rows:
        raise FitError(
            f"{delta.tensor.key} holds rows of {delta.shape[1]} numbers for tokens up to "
            f"{max(delta.indices, default=0)}, but {name} in {info.file} has shape {list(info.shape)}. Is this the "
            "right base model, with its vocabulary resized as in training?"
        )


def _turned_rule(plan: Plan, view: Checkpoint) -> Callable[[Update, tuple[int, int]], bool]:
    """How linear weights of this base are stored: by shape, and where a square one cannot tell, by the architecture,
    by the other modules of the adapter, by the adapter's own flag, in this order.
    """
    kinds = {plan.model_type, *(v.get("model_type") for v in plan.config.values() if isinstance(v, dict))}
    conv1d = bool(kinds & CONV1D_MODELS)
    seen = set()
    for name, updates in plan.updates.items():
        shape = view.tensors[name].shape
        for update, _ in updates:
            out, in_ = update.delta.shape
            if update.kind == "linear" and out != in_ and shape in {(out, in_), (in_, out)}:
                seen.add((_is_conv1d(update.module), shape == (in_, out)))

    def turned(update: Update, stored: tuple[int, int]) -> bool:
        if plan.dialect:
            return False
        out, in_ = update.delta.shape
        by_name = _is_conv1d(update.module)
        upright, turned = _fits((out, in_), stored), _fits((in_, out), stored)
        if upright != turned or not upright:
            may = (conv1d and by_name) or update.transposed or not plan.model_type
            return turned and bool(may)
        all_conv1d = plan.model_type in CONV1D_MODELS and not any(isinstance(v, dict) for v in plan.config.values())
        if conv1d and (by_name or not (all_conv1d and update.transposed)):
            return by_name
        if update.told:
            return bool(update.transposed)
        alike = {turn for named, turn in seen if named == by_name}
        if len(alike) == 1 and not conv1d:
            return alike == {True}
        if update.transposed and plan.model_type and not by_name:
            raise FitError(
                f"{update.module} is square, and nothing tells whether the base stores it as (in, out): its config "
                f"says model_type {plan.model_type}, the adapter's says fan_in_fan_out. Set fan_in_fan_out "
                "to what is right for it."
            )
        return bool(update.transposed)

    return turned


def _fits(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether sizes agree, of which -1 are not known."""
    return all(want in (has, -1) for want, has in zip(expected, found, strict=True))


def _is_conv1d(module: str) -> bool:
    return module.rpartition(".")[2] in CONV1D_LAYERS


def _misfit_sentence(update: Update, expected: tuple[int, ...], info: TensorInfo, plan: Plan) -> str:
    out, in_ = update.delta.shape
    shape, wanted = list(info.shape), list((out, *update.kernel_size) if update.kernel_size else expected)
    return (
        f"{update.module}: the adapter updates a weight of {out} outputs and {in_} inputs, but the base weight in "
        f"{info.file} has shape {shape} (expected {wanted}). Is this the right base model?{plan.trained_on}"
    )
