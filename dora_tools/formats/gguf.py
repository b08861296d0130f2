"""llama.cpp's LoRA adapters: a GGUF file with ``<base tensor>.lora_a`` and ``.lora_b``.

The run time multiplies B (A x) by alpha / rank, with one alpha for the file and each tensor's own rank, or by 1 where
alpha is 0 or missing. Any scaling of any module can be written exactly, by folding into lora_B what alpha does not say.
It has no place for a DoRA's magnitude.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, LowRank, Update
from ..checkpoint import Checkpoint, Ref, TensorInfo, Tensors, assembled, ref
from ..errors import InputError, TargetError, UnsupportedError
from ..names.gguf import EMBEDDING, HEAD, Dialect, of_config, of_gguf, settings
from . import Format, Given, Reading, Target, Written

if TYPE_CHECKING:
    import torch

_A, _B = ".lora_a", ".lora_b"
_ALPHA = "adapter.lora.alpha"
_HUB = "https://huggingface.co/"


def _sniff(checkpoint: Checkpoint) -> bool:
    return "gguf" in checkpoint.metadata


def _read(checkpoint: Checkpoint, given: Given) -> Reading:
    if not _sniff(checkpoint):
        raise InputError("This is no GGUF file.")
    values = settings(checkpoint)
    kind = values.get("adapter.type") if values.get("general.type") == "adapter" else None
    if kind != "lora":
        raise InputError(
            f"This GGUF is of type {values.get('general.type', 'model')}{f' ({kind})' if kind else ''}, no LoRA "
            "adapter. A model is a base: give it with --base."
        )
    if "adapter.alora.invocation_tokens" in next(iter(checkpoint.metadata["gguf"].values())).places:
        raise UnsupportedError("This is an activated LoRA (aLoRA), which depends on the input: it has no merged form.")
    names = _halves(checkpoint)
    dialect = _dialect(values, given)
    alpha, base = _alpha(values, given), given.base() if given.base is not None else None
    found = [update for name in names for update in _updates(checkpoint, name, alpha, given)]
    known = base.tensors if base is not None and "gguf" not in base.metadata else None
    url = values.get("general.base_model.0.repo_url")
    origin = url.removeprefix(_HUB) if isinstance(url, str) and url.startswith(_HUB) else None
    stored = Adapter(tuple(found), base_model=origin, format="gguf")
    try:
        return Reading(dialect.back(stored, known))
    except InputError as error:  # nobody said how many heads there are: names and shapes can be shown all the same
        doubt = str(error)
        unordered = dialect.back(stored, known, reorder=False)
        updates = tuple(replace(u, delta=_withheld(u, doubt)) for u in unordered.updates)
        return Reading(replace(unordered, updates=updates, notes=(doubt,)), doubt=doubt)


def _withheld(update: Update, why: str) -> LowRank:
    """An update whose values cannot be had, as nobody knows the order of its rows."""

    def fetch() -> torch.Tensor:
        raise InputError(why)

    delta = _low(update)
    return replace(delta, lora_B=replace(delta.lora_B, fetch=fetch, origin=None))


def _dialect(values: Mapping[str, Any], given: Given) -> Dialect:
    architecture = str(values["general.architecture"])
    base = given.base() if given.base is not None else None
    if base is None:
        return Dialect(architecture)
    dialect = of_gguf(base) if "gguf" in base.metadata else of_config(base.metadata.get("config") or {})
    if dialect.architecture != architecture:
        raise InputError(f"The adapter is of architecture '{architecture}', and the base of '{dialect.architecture}'.")
    return dialect


def _halves(checkpoint: Checkpoint) -> list[str]:
    """The base tensors that have both halves, in the file's order. Raises InputError for anything else."""
    names = [name.removesuffix(_A) for name in checkpoint.tensors if name.endswith(_A)]
    lone = [n for n in checkpoint.tensors if n[: -len(_A)] not in names or not n.endswith((_A, _B))]
    lone += [f"{name}{_A}" for name in names if f"{name}{_B}" not in checkpoint.tensors]
    if lone:
        raise UnsupportedError(
            f"{lone[0]} is not half of a pair of .lora_a and .lora_b; llama.cpp would refuse or ignore it, and "
            "dora-tools does not drop it silently."
        )
    return names


def _alpha(values: Mapping[str, Any], given: Given) -> float:
    alpha = given.alpha if given.alpha is not None else values.get(_ALPHA, 0.0)
    if not isinstance(alpha, int | float):
        raise InputError(f"{_ALPHA} is {alpha!r}, not a number.")
    return float(alpha)


def _updates(checkpoint: Checkpoint, name: str, alpha: float, given: Given) -> list[Update]:
    a, b = checkpoint.tensors[name + _A], checkpoint.tensors[name + _B]
    if len(a.shape) != len(b.shape) or len(a.shape) not in (2, 3) or a.shape[:-2] != b.shape[:-2]:
        raise InputError(f"{name}: lora_a has shape {list(a.shape)} and lora_b {list(b.shape)}, which do not match.")
    rank = b.shape[-1]
    scaling = given.scaling if given.scaling is not None else alpha / rank if alpha else 1.0
    source = "given" if given.scaling is not None else f"{alpha:g}/{rank}" if alpha else "no alpha"
    module = name.removesuffix(".weight")
    if name == EMBEDDING:
        delta = LowRank(ref(checkpoint, name + _A).T, ref(checkpoint, name + _B), scaling, source)
        return [Update(module, delta, kind="embedding")]
    if len(a.shape) == 2:
        return [Update(module, LowRank(ref(checkpoint, name + _A), ref(checkpoint, name + _B), scaling, source))]
    out = b.shape[1]
    return [
        Update(
            module,
            LowRank(_slice(checkpoint, name + _A, e), _slice(checkpoint, name + _B, e), scaling, source),
            part=(e * out, (e + 1) * out),
        )
        for e in range(a.shape[0])
    ]


def _slice(checkpoint: Checkpoint, name: str, index: int) -> Ref:
    """One matrix of a stack."""
    info = checkpoint.tensors[name]
    rows, width = info.shape[1:]

    def fetch() -> torch.Tensor:
        return checkpoint.read(name, index * rows, (index + 1) * rows)

    return Ref((rows, width), info.dtype, fetch, f"{name}[{index}]")


def _write(adapter: Adapter, target: Target) -> Written:
    """One GGUF file. Raises TargetError for what llama.cpp cannot apply at run time."""
    if adapter.is_dora:
        raise TargetError(
            "llama.cpp's adapters have no place for a DoRA's magnitude. Three ways out: merge it into the GGUF (merge "
            "--base MODEL.gguf -o OUT.gguf); merge it exactly, from the full-precision model (merge --base HF_DIR "
            "--like MODEL.gguf -o OUT.gguf); or make it a LoRA first, with an error that is printed (to-lora --rank R)."
        )
    if adapter.replaced:
        raise TargetError(
            f"The adapter holds whole trained tensors ({next(iter(adapter.replaced))}, …), which llama.cpp does not "
            "take from an adapter. Merge it into the GGUF instead."
        )
    dialect, tied = _target(target)
    translated = dialect.adapter(adapter)
    for update, original in zip(translated.updates, adapter.updates, strict=True):
        if not isinstance(update.delta, LowRank) or update.bias is not None:
            raise TargetError(f"{original.module}: llama.cpp's adapters hold low-rank updates without bias. Merge it.")
        if update.kind == "embedding" and f"{update.module}.weight" != EMBEDDING:
            raise TargetError(
                f"{original.module}: llama.cpp applies adapters to no embedding but the tokens'. Merge it."
            )
        if tied and f"{update.module}.weight" in (EMBEDDING, HEAD):
            raise TargetError(
                f"{original.module}: in this model the embedding is the head too, and llama.cpp aborts on an adapter "
                "of either. Merge it into the GGUF (with --untie)."
            )
    groups: dict[str, list[Update]] = {}
    for update in translated.updates:
        groups.setdefault(f"{update.module}.weight", []).append(update)
    for name, updates in groups.items():
        if len({u.delta.shape for u in updates}) > 1 and name.endswith("_exps.weight"):
            raise TargetError(f"{name}: the experts' updates are of different sizes, so they are not of one stack.")
    experts = {name: _experts(name, updates, dialect, target) for name, updates in groups.items()}
    ranks = {name: _rank(updates, experts[name]) for name, updates in groups.items()}
    products = Counter(
        delta.scaling * ranks[name] for name, updates in groups.items() for u in updates if (delta := _low(u))
    )
    alpha = products.most_common(1)[0][0]
    refs: dict[str, Ref] = {}
    for name, updates in groups.items():
        factors = [_low(u).scaling * ranks[name] / alpha for u in updates]
        a, b = _pair(name, updates, factors, experts[name], ranks[name], dialect.known)
        refs[name + _A], refs[name + _B] = _storable(a), _storable(b)
    values: dict[str, Any] = {"general.architecture": dialect.architecture, "general.type": "adapter"}
    values |= {"adapter.type": "lora", _ALPHA: float(alpha)}
    if adapter.base_model and "/" in adapter.base_model and not adapter.base_model.startswith(("/", ".")):
        values |= {"general.base_model.count": 1, "general.base_model.0.repo_url": _HUB + adapter.base_model}
    folded = sum(c for p, c in products.items() if p != alpha)
    notes = [f"{folded} modules have another scaling than the file's alpha; it is in their lora_B."] if folded else []
    return Written(Tensors(refs, "adapter.gguf", {"gguf_values": values}), "adapter.gguf", notes=tuple(notes))


def _target(target: Target) -> tuple[Dialect, bool]:
    """What the adapter is to fit, and whether its head is its embedding. Raises TargetError where nobody said."""
    base = target.base() if target.base is not None else None
    if base is not None and "gguf" in base.metadata:
        dialect = of_gguf(base)
        if target.architecture not in (None, dialect.architecture):
            raise TargetError(f"--arch says {target.architecture}, and the base is of '{dialect.architecture}'.")
        return dialect, HEAD not in base.tensors
    config: Mapping[str, Any] = (base.metadata.get("config") or {}) if base is not None else {}
    if config:
        dialect = of_config(config, target.architecture)
        return dialect, bool(config.get("tie_word_embeddings", True))
    if target.architecture is None:
        raise TargetError(
            "A GGUF adapter is of one architecture's names and row orders: say --like, a GGUF of the base model, or "
            "--base, the Hugging Face model (its config.json), or --arch, if the rows of q and k are as they are."
        )
    return Dialect(target.architecture), True


def _low(update: Update) -> LowRank:
    assert isinstance(update.delta, LowRank)
    return update.delta


def _experts(name: str, updates: Sequence[Update], dialect: Dialect, target: Target) -> int:
    """How many matrices are stacked in the base's tensor; 0: it is one matrix."""
    if not name.endswith("_exps.weight"):
        return 0
    if name in dialect.known:
        return dialect.known[name].shape[0]
    base = target.base() if target.base is not None else None
    config = (base.metadata.get("config") or {}) if base is not None else {}
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(config.get(key), int):
            count: int = config[key]
            return count
    raise TargetError(f"How many experts {name} has is not known: say --like, a GGUF of the base model.")


def _rank(updates: Sequence[Update], experts: int) -> int:
    """The rank of a tensor's pair: of stacked matrices the largest, of those side by side in one the sum."""
    if not experts:
        return sum(_low(u).rank for u in updates)
    ranks = Counter[int]()
    for u in updates:
        ranks[_expert(u, updates)] += _low(u).rank
    return max(ranks.values())


def _expert(update: Update, updates: Sequence[Update]) -> int:
    assert update.part is not None
    return update.part[0] // _height(updates)


def _height(updates: Sequence[Update]) -> int:
    """Rows of one matrix of a stack: of a fused pair (gate and up) twice those of an update."""
    out = updates[0].delta.shape[0]
    fused = updates[0].module.endswith("gate_up_exps")
    return 2 * out if fused else out


def _pair(
    name: str,
    updates: Sequence[Update],
    factors: Sequence[float],
    experts: int,
    rank: int,
    known: Mapping[str, TensorInfo],
) -> tuple[Ref, Ref]:
    """lora_a and lora_b of one base tensor, whose product with alpha / rank is all of its updates."""
    if len(updates) == 1 and updates[0].part is None:
        delta = _low(updates[0])
        b = delta.lora_B.times(factors[0])
        return (delta.lora_A.T, b) if updates[0].kind == "embedding" else (delta.lora_A, b)
    width = updates[0].delta.shape[1]
    if not experts:
        return _side_by_side(updates, factors, rank, known[name].rows, width, 0)
    height = _height(updates)
    members: dict[int, list[int]] = {}
    for i, update in enumerate(updates):
        members.setdefault(_expert(update, updates), []).append(i)
    pairs = {
        e: _side_by_side([updates[i] for i in at], [factors[i] for i in at], rank, height, width, e * height)
        for e, at in members.items()
    }
    return _stack({e: a for e, (a, _) in pairs.items()}, experts), _stack(
        {e: b for e, (_, b) in pairs.items()}, experts
    )


def _side_by_side(
    updates: Sequence[Update], factors: Sequence[float], rank: int, rows: int, width: int, start: int
) -> tuple[Ref, Ref]:
    """The updates of some of a matrix's ``rows`` each, as one: A over one another, B along the diagonal."""
    at, a, b = 0, list[tuple[Ref, int, int]](), list[tuple[Ref, int, int]]()
    for update, factor in zip(updates, factors, strict=True):
        delta, first = _low(update), update.part[0] - start if update.part else 0
        a.append((delta.lora_A, at, 0))
        b.append((delta.lora_B.times(factor), first, at))
        at += delta.rank
    return assembled((rank, width), a), assembled((rows, rank), b)


def _stack(matrices: Mapping[int, Ref], count: int) -> Ref:
    """A promise of ``count`` matrices over one another, zero where there is none."""
    one = next(iter(matrices.values()))

    def fetch() -> torch.Tensor:
        loaded = {index: matrix.load() for index, matrix in matrices.items()}
        whole = next(iter(loaded.values())).new_zeros((count, *one.shape))
        for index, values in loaded.items():
            whole[index] = values
        return whole

    return Ref((count, *one.shape), one.kept, fetch, one.key)


def _storable(promise: Ref) -> Ref:
    """F16 and F32 stay; everything else becomes F32, which llama.cpp multiplies on every device."""
    return promise if promise.kept in ("F16", "F32") else replace(promise, dtype="F32")


FORMAT = Format("gguf", "llama.cpp: a LoRA adapter as a GGUF file", _sniff, _read, _write, for_model=True)
