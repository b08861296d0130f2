"""LyCORIS networks of any model (``create_lycoris``): LoHa, LoKr and LoCon, with or without DoRA: arXiv 2309.14859.

Keys are ``lycoris_<path>.<leaf>``, the path with _ for every dot, so that only the base tells which module is meant.
The rank is that of the tensors, ``alpha`` one of them. A ``dora_scale`` (out, 1, …) is of outputs, one (1, in) of
inputs, and PyTorch's eps of the magnitude's type is added to the norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite, prod

from ..adapter import Adapter, Axis, Delta, Kind, LowRank, Magnitude, Update
from ..checkpoint import Checkpoint, Ref, ref
from ..deltas import Hadamard, Kronecker, multiplied, tucker
from ..dtypes import DTYPES
from ..errors import FitError, InputError, UnsupportedError
from . import Format, Given, Reading

PREFIX = "lycoris_"
_KEY = re.compile(r"lycoris_\w+\.(hada_w1_a|lokr_w[12](_a)?|lora_down\.weight)$")
_EPS = 2.0**-23  # of float32


def _sniff(checkpoint: Checkpoint) -> bool:
    return "adapter_config" not in checkpoint.metadata and any(_KEY.match(name) for name in checkpoint.tensors)


@dataclass(frozen=True)
class _Module:
    """One module's keys by leaf, and the shape of its weight in the base."""

    checkpoint: Checkpoint
    path: str
    keys: Mapping[str, str]
    shape: tuple[int, ...]

    def tensor(self, leaf: str, *sizes: int | None, flat: bool = False) -> Ref:
        """A tensor with these sizes, None for any; ``flat``: as a matrix of its first axis and all others."""
        if leaf not in self.keys:
            raise InputError(f"{self.path} has {', '.join(self.keys.values())}, but no {leaf}: the file is incomplete.")
        promise = ref(self.checkpoint, self.keys[leaf])
        if flat and len(promise.shape) > 1 and 0 not in promise.shape:
            promise = promise.reshape(promise.shape[0], -1)
        shape, kind = promise.shape, DTYPES[promise.dtype]
        right = len(shape) == len(sizes) and 0 not in shape
        if not right or not all(want in (None, has) for want, has in zip(sizes, shape, strict=True)):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise InputError(f"{promise.key} has shape {list(shape)}; expected [{expected}].")
        if not kind.floating and not promise.dtype.startswith("F8"):
            raise InputError(f"{promise.key} is stored as {promise.dtype}; it holds fractions.")
        return promise

    def product(self, a: str, b: str, core: str = "") -> LowRank:
        """``a @ b``, or around a Tucker core, whose factors lie the other way."""
        if core in self.keys:
            shape = self.checkpoint.tensors[self.keys[core]].shape
            middle = self.tensor(core, *[None] * max(3, len(shape)))
            return tucker(middle, self.tensor(a, middle.shape[0], None), self.tensor(b, middle.shape[1], None))
        left = self.tensor(a, None, None)
        return LowRank(self.tensor(b, left.shape[1], None, flat=True), left, 1.0)

    def scaling(self, rank: int) -> tuple[float, str]:
        """alpha / rank, where an alpha that is 0 or not there is the rank."""
        if "alpha" not in self.keys:
            return 1.0, "no alpha"
        promise = ref(self.checkpoint, self.keys["alpha"])
        if prod(promise.shape) != 1:
            raise InputError(f"{promise.key} has shape {list(promise.shape)}; it is one number.")
        alpha = float(promise.load().reshape(()))
        if not isfinite(alpha) or abs(alpha) > 1e15:
            raise InputError(f"{promise.key} is {alpha}, which would erase the adapter.")
        return (alpha / rank, f"{alpha:g}/{rank}") if alpha else (1.0, "alpha 0")


def _loha(module: _Module) -> Delta:
    """s (B₁A₁) ⊙ (B₂A₂): arXiv 2108.06098."""
    one = module.product("hada_w1_a", "hada_w1_b", "hada_t1")
    two = module.product("hada_w2_a", "hada_w2_b", "hada_t2")
    if one.shape != two.shape:
        raise InputError(
            f"{module.path}: the two products of LoHa have shapes {list(one.shape)} and {list(two.shape)}, which must "
            "be equal."
        )
    return Hadamard(LowRank(one.lora_A, one.lora_B, *module.scaling(one.rank)), two)


def _lokr(module: _Module) -> Delta:
    """s w₁ ⊗ w₂, s = 1 where both are stored in full: arXiv 2212.10650."""
    products = {n: module.product(f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
                for n in "12" if f"lokr_w{n}" not in module.keys}  # fmt: skip
    whole = {n: module.tensor(f"lokr_w{n}", None, None, flat=True) for n in "12" if n not in products}
    left, right = (whole[n] if n in whole else multiplied(products[n]) for n in "12")
    twice = next((n for n in whole if {f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}"} & module.keys.keys()), None)
    if twice is not None:
        raise InputError(f"{module.path} has lokr_w{twice} in full and as a product as well: which is it?")
    ranks = [products[n].rank for n in "21" if n in products]
    scaling = module.scaling(ranks[0])[0] if ranks else 1.0
    return Kronecker(left, right, scaling, sum(prod(module.checkpoint.tensors[k].shape) for k in module.keys.values()))


def _locon(module: _Module) -> Delta:
    """s BA, which in a convolution may have a Tucker core between: B and A (r, in, 1, 1) then."""
    up, down = module.tensor("lora_up.weight", None, None, flat=True), "lora_down.weight"
    low = LowRank(module.tensor(down, up.shape[1], None, flat=True), up, *module.scaling(up.shape[1]))
    if "lora_mid.weight" not in module.keys:
        return low
    core = module.tensor("lora_mid.weight", low.rank, low.rank, None, None)
    return LowRank(tucker(core, up.T, low.lora_A).lora_A, up, low.scaling, low.source)


_KINDS: tuple[tuple[str, Callable[[_Module], Delta], frozenset[str]], ...] = (
    ("hada_", _loha, frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})),
    ("lokr_", _lokr, frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})),
    ("lora_", _locon, frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight"})),
)


def _read(checkpoint: Checkpoint, given: Given) -> Reading:
    if given.base is None:
        raise InputError(
            f"LyCORIS writes the names of modules with _ for every dot ({next(iter(checkpoint.tensors))}): say --base, "
            "which tells what they are (in Python, Given(base=…))."
        )
    grouped: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        name, _, leaf = key.partition(".")
        grouped.setdefault(name, {})[leaf] = key
    known = given.base().tensors
    spelled: dict[str, list[str]] = {}
    for name, info in known.items():
        if name.endswith(".weight") and len(info.shape) > 1:
            spelled.setdefault(PREFIX + name.removesuffix(".weight").replace(".", "_"), []).append(name)
    updates, notes = [], []
    for name, keys in grouped.items():
        found = spelled.get(name, [])
        if len(found) != 1:
            near = ", ".join(get_close_matches(name, list(spelled), n=2)) or "none like it"
            raise FitError(
                f"{name} is the name of {' and '.join(found) or 'no weight'} in the base, which has {near}. Is this "
                "the right base model?"
            )
        updates.append(_update(_Module(checkpoint, found[0].removesuffix(".weight"), keys, known[found[0]].shape)))
    half = {u.magnitude.vector.dtype for u in updates if u.magnitude is not None} - {"F32", "F64"}
    if half:
        notes.append(
            f"dora_scale is stored as {', '.join(sorted(half))}. The eps beside its norms was that of the type it was "
            "trained in, which is taken to be float32."
        )
    return Reading(Adapter(tuple(updates), format="lycoris", notes=tuple(notes)))


def _update(module: _Module) -> Update:
    kinds = [kind for kind in _KINDS if any(leaf.startswith(kind[0]) for leaf in module.keys)]
    if len(kinds) != 1:
        raise UnsupportedError(
            f"{module.path} has {', '.join(module.keys.values())}; dora-tools reads LyCORIS' LoHa, LoKr and LoCon."
        )
    _, make, leaves = kinds[0]
    foreign = next((key for leaf, key in module.keys.items() if leaf not in {*leaves, "alpha", "dora_scale"}), None)
    if foreign is not None:
        raise UnsupportedError(f"{foreign} is not something that dora-tools can merge.")
    conv = len(module.shape) > 2
    kind: Kind = "conv" if conv else "linear"
    magnitude = _magnitude(module) if "dora_scale" in module.keys else None
    return Update(module.path, make(module), magnitude, kind=kind, kernel_size=module.shape[1:] if conv else ())


def _magnitude(module: _Module) -> Magnitude:
    """Its axis by where its sizes stand; of a convolution, one for each input is of several columns."""
    key, (out, in_, *kernel) = module.keys["dora_scale"], module.shape
    shape = module.checkpoint.tensors[key].shape
    ones = all(size == 1 for size in shape[2:])
    if len(shape) < 2 or not ones or (shape[:2] != (out, 1) and shape[:2] != (1, in_)):
        raise FitError(f"{key} has shape {list(shape)}; the base weight has {out} outputs and {in_} inputs.")
    axis: Axis = "out" if shape[:2] == (out, 1) else "in"
    if axis == "in" and prod(kernel) != 1:
        raise UnsupportedError(f"{key} is one magnitude for each input of a convolution, which cannot be merged yet.")
    return Magnitude(module.tensor("dora_scale", *shape).reshape(-1), axis, _EPS)


FORMAT = Format(
    "lycoris", "LyCORIS: lycoris_<path>.hada_…, lokr_… or lora_up and lora_down, with dora_scale", _sniff, _read
)
