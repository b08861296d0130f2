"""The common representation of every LoRA and DoRA adapter, and its invariants.

An adapter is a set of *updates* of modules and of *replacements* of whole tensors. An update is always given as
(out, in), the way the mathematics is written; binding turns it where the base stores (in, out). Tensors are promises
(``Ref``), so an adapter can be read, bound, planned and summarised without loading a value. Shapes are checked here,
once; values when they load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import frexp, isfinite
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from .checkpoint import Ref
from .dtypes import DTYPES
from .errors import InputError

if TYPE_CHECKING:
    import torch

Axis = Literal["out", "in"]
EpsRule = Literal["add", "clamp"]
Kind = Literal["linear", "embedding", "conv", "expert", "whole"]


class Kernel(Protocol):
    """A delta with its values in place, ready to run."""

    def apply(self, w: torch.Tensor, start: int) -> None:
        """``w``: rows [start, start + len(w)) of the stored matrix, float32; becomes the updated rows, in place."""


class Delta(Protocol):
    """What an update adds: a function of a block of base rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it updates."""

    @property
    def parameters(self) -> int:
        """How many numbers it is stored in."""

    @property
    def held(self) -> int:
        """How many numbers are in memory once it is loaded."""

    def turned(self) -> Delta:
        """The same update of the transposed matrix."""

    def take(self, rows: slice | Sequence[int]) -> Delta:
        """The update of some of the rows, or of all in another order. Raises UnsupportedError where rows mix."""

    def onto(self, base: Ref) -> Delta:
        """The update with the base matrix at hand, as it is stored; most need none and are as they were."""

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        """Load the values, multiplied by ``strength``. With ``check``, raises InputError for NaN and Inf."""


class SelfContained:
    """A delta that needs nothing of the base, and in memory as many numbers as it is stored in, as most do."""

    __slots__ = ()

    @property
    def parameters(self) -> int:
        raise NotImplementedError

    @property
    def held(self) -> int:
        return self.parameters

    def onto(self, base: Ref) -> Self:
        return self


@dataclass(frozen=True, slots=True)
class LowRank(SelfContained):
    """``scaling · lora_B @ lora_A`` with lora_A (rank, in), lora_B (out, rank): LoRA, arXiv 2106.09685.

    ``scaling`` is the number really multiplied; ``source`` says where it came from.
    """

    lora_A: Ref
    lora_B: Ref
    scaling: float
    source: str = "config"

    def __post_init__(self) -> None:
        a, b = self.lora_A, self.lora_B
        if 0 in a.shape or 0 in b.shape or len(a.shape) != 2 or len(b.shape) != 2:
            bad = a if 0 in a.shape or len(a.shape) != 2 else b
            raise InputError(
                f"{bad.key}: a low-rank factor must be a matrix with entries, but its shape is {list(bad.shape)}. "
                "Adapters saved under DeepSpeed ZeRO-3 or FSDP without gathering look like this; save it again with "
                "the parameters gathered."
            )
        for factor in (a, b):
            if not (DTYPES[factor.dtype].floating or factor.dtype.startswith("F8")):
                raise InputError(f"{factor.key} is stored as {factor.dtype}; a factor of a LoRA holds fractions.")
        if a.shape[0] != b.shape[1]:
            raise InputError(
                f"{a.key} has rank {a.shape[0]} (shape {list(a.shape)}), but {b.key} has rank {b.shape[1]} "
                f"(shape {list(b.shape)}). The two factors of a module must share their rank."
            )
        if not isfinite(self.scaling) or self.scaling == 0:
            raise InputError(f"{a.key}: a scaling of {self.scaling} would erase the adapter; is lora_alpha right?")

    @property
    def shape(self) -> tuple[int, int]:
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def parameters(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def turned(self) -> LowRank:
        """(BA)ᵀ = AᵀBᵀ."""
        return replace(self, lora_A=self.lora_B.T, lora_B=self.lora_A.T)

    def take(self, rows: slice | Sequence[int]) -> LowRank:
        return replace(self, lora_B=self.lora_B.rows(rows))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        a = loaded(self.lora_A, device, dtype, check).contiguous()
        b = loaded(self.lora_B, device, dtype, check).contiguous()
        scale = self.scaling * strength
        if abs(frexp(scale)[0]) == 0.5:  # a power of two: multiplying by it rounds nothing, so it can go first
            return LowRankKernel(a, b * scale)
        return ScaledLowRankKernel(a, b, scale)


@dataclass(frozen=True, slots=True)
class LowRankKernel:
    a: torch.Tensor
    b: torch.Tensor  # already times scaling and strength

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.addmm_(self.b[start : start + w.shape[0]], self.a)


@dataclass(frozen=True, slots=True)
class ScaledLowRankKernel:
    """Rounds the product, then s times it, then the sum, in PEFT's order: folding s moves 1e-4 of fp16 results."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.add_(self.b[start : start + w.shape[0]].mm(self.a).mul_(self.scale))


@dataclass(frozen=True, slots=True)
class Unchanged(SelfContained):
    """No delta: only the magnitude moved. ``shape`` has -1 for a side that the file does not tell."""

    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        return 0

    def turned(self) -> Unchanged:
        return Unchanged(self.shape[::-1])

    def take(self, rows: slice | Sequence[int]) -> Unchanged:
        if not isinstance(rows, slice):
            return self
        return Unchanged((len(range(*rows.indices(self.shape[0]))), self.shape[1]))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        return self

    def apply(self, w: torch.Tensor, start: int) -> None:
        """V = W."""


@dataclass(frozen=True, slots=True)
class Dense(SelfContained):
    """A delta given in full, or computed in full when it loads: (out, in). A bias is one of a single column."""

    tensor: Ref
    numbers: int = 0  # that it is stored in, where those are fewer

    @property
    def shape(self) -> tuple[int, int]:
        out, in_ = self.tensor.shape
        return out, in_

    @property
    def parameters(self) -> int:
        return self.numbers or self.shape[0] * self.shape[1]

    @property
    def held(self) -> int:
        return self.shape[0] * self.shape[1]

    def turned(self) -> Dense:
        return replace(self, tensor=self.tensor.T)

    def take(self, rows: slice | Sequence[int]) -> Dense:
        return replace(self, tensor=self.tensor.rows(rows))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> DenseKernel:
        return DenseKernel((loaded(self.tensor, device, dtype, check) * strength).contiguous())


@dataclass(frozen=True, slots=True)
class Toward(SelfContained):
    """A part of the way from W to another tensor R of the same shape: adds w (R − W)."""

    tensor: Ref
    shape: tuple[int, int]

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def turned(self) -> Toward:
        return Toward(self.tensor.T, self.shape[::-1])

    def take(self, rows: slice | Sequence[int]) -> Toward:
        values = self.tensor.reshape(*self.shape).rows(rows)
        return Toward(values, (values.shape[0], self.shape[1]))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        values = loaded(self.tensor, device, dtype, check).reshape(self.shape)
        return TowardKernel(values.contiguous(), strength)


@dataclass(frozen=True, slots=True)
class TowardKernel:
    values: torch.Tensor
    strength: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.lerp_(self.values[start : start + w.shape[0]], self.strength)


@dataclass(frozen=True, slots=True)
class DenseKernel:
    values: torch.Tensor

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.add_(self.values[start : start + w.shape[0]])


def loaded(promise: Ref, device: str, dtype: torch.dtype, check: bool = True) -> torch.Tensor:
    """The values of a promise. With ``check``, NaN and Inf raise InputError: one of them spreads to whole rows."""
    values = promise.load()
    if check and not values.isfinite().all():
        bad = int(values.numel() - values.isfinite().sum())
        raise InputError(
            f"{promise.key} holds {bad} values that are NaN or Inf, of {values.numel()}: the training diverged or the "
            "file is damaged. Use an earlier checkpoint; --allow-nonfinite merges it all the same."
        )
    return values.to(device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA's m, one number per output (axis "out") or per input (axis "in"): arXiv 2402.09353.

    ``W' = (m / ‖V‖) ⊙ V`` with ``V = W + delta``; the norm runs along the other axis. ``eps`` is added to the norm, or
    is its least value ("clamp"). ``scales_bias``: the trainer's forward pass has the bias inside, so b' = b ⊙ m / ‖V‖.
    """

    vector: Ref
    axis: Axis = "out"
    eps: float = 0.0
    eps_rule: EpsRule = "add"
    scales_bias: bool = False

    def __post_init__(self) -> None:
        if len(self.vector.shape) != 1:
            raise InputError(f"{self.vector.key}: a magnitude is a vector, not of shape {list(self.vector.shape)}.")
        if not DTYPES[self.vector.dtype].floating:
            raise InputError(f"{self.vector.key} is stored as {self.vector.dtype}; a magnitude holds fractions.")

    def turned(self) -> Magnitude:
        return replace(self, axis="in" if self.axis == "out" else "out")


@dataclass(frozen=True, slots=True)
class Update:
    """What one module gains. DoRA iff ``magnitude`` is there; there is no second flag.

    ``module`` is the path in the model as it was trained, and ``parameter`` which of its parameters, mostly the weight.
    One of kind "expert" is of one matrix of a parameter that stacks them (expert, …): its module is
    ``<module>.<expert>.<parameter>``, as if each were a layer. ``bias`` is added to the module's bias, already scaled.
    ``kernel_size`` is (in, k, …) of a conv weight, whose factors are given flat. An embedding is (out = dim,
    in = vocabulary). ``transposed`` says what the adapter claims of the base: True for a weight stored (in, out);
    ``told``: of this very layer, so that it stands where shapes cannot tell. ``part``: the rows [first, last) of the
    stored tensor that it is of, where that holds several matrices (stacked experts, fused projections). ``shared``:
    the training changed the base's own parameter, so whatever is tied to it changed with it. ``optional``: it is left
    out where the base has no such parameter (a bias that is scaled).
    """

    module: str
    delta: Delta
    magnitude: Magnitude | None = None
    bias: Ref | None = None
    kind: Kind = "linear"
    kernel_size: tuple[int, ...] = ()
    transposed: bool | None = None
    told: bool = False
    part: tuple[int, int] | None = None
    parameter: str = "weight"
    shared: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        """Of the parameter that it changes."""
        return f"{self.module}.{self.parameter}"

    def __post_init__(self) -> None:
        out, in_ = self.delta.shape
        if self.magnitude is not None:
            if self.magnitude.scales_bias and self.magnitude.axis == "in":
                raise InputError(
                    f"{self.magnitude.vector.key}: a magnitude for each input cannot scale a bias, which is of outputs."
                )
            expected = out if self.magnitude.axis == "out" else in_
            found = self.magnitude.vector.shape[0]
            if expected not in (found, -1):
                raise InputError(
                    f"{self.magnitude.vector.key} has {found} entries, but the factors of {self.module} update a "
                    f"matrix with {expected} {'outputs' if self.magnitude.axis == 'out' else 'inputs'}."
                )
        if self.bias is not None and self.bias.shape != (out,):
            raise InputError(f"{self.bias.key} has shape {list(self.bias.shape)}; {self.module} has {out} outputs.")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A whole trained tensor that takes the base's place (modules_to_save, a trained bias, a resized embedding).

    ``shared``: the training wrote into the base's own parameter, so whatever was tied to it changed with it; otherwise
    it was a copy beside the base, and a tied partner kept its value. ``alone``: the base is known to tie it to nothing.
    """

    tensor: Ref
    shared: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Adapter:
    """Updates (one per module), replacements (by the parameter's name as trained), and where they came from.

    ``rslora``: whether its alpha is divided by √rank (rsLoRA) in files that record one; None: nobody said. ``task``:
    what it was trained for, in PEFT's words (CAUSAL_LM, SEQ_CLS, …), which tells what head the model had.
    ``extra`` keeps the foreign configuration, so that writing the same format again loses nothing; ``notes`` are
    sentences for the user: what was left aside, what is unusual. ``layers``: the network was trained with these ranges
    [start, end) of the base's layers, one after the other, some of them several times.
    """

    updates: tuple[Update, ...]
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    base_model: str | None = None
    task: str | None = None
    format: str = ""
    rslora: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, tuple[int, int] | None]] = set()
        for update in self.updates:
            if (update.name, update.part) in seen:
                raise InputError(f"The adapter updates {update.name} twice.")
            seen.add((update.name, update.part))
        if not self.updates and not self.replaced:
            raise InputError("The adapter holds no update and no trained tensor: there is nothing in it to use.")

    @property
    def is_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates)
