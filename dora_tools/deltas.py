"""The deltas of other methods than LoRA, each a function of a block of base rows like ``adapter.LowRank``.

Shapes are (out, in) as the mathematics is written, and every delta knows its transpose, so that it fits a base that
stores (in, out). Those that are a function of the whole W are given it by ``onto``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from .adapter import Axis, Delta, Kernel, LowRank, LowRankKernel, SelfContained, TowardKernel, loaded
from .checkpoint import Ref, computed
from .dtypes import DTYPES, to_torch
from .errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Start = Literal["pissa", "olora", "kasa"]


def multiplied(low: LowRank) -> Ref:
    """The product of two factors in full, without its scaling."""
    return computed(low.shape, lambda b, a: b @ a, low.lora_B, low.lora_A)


def tucker(core: Ref, a: Ref, b: Ref) -> LowRank:
    """A core (r, s, …) with factors (r, out) and (s, in), as a product for the flat kernel (out, in · …)."""
    shape = core.shape[0], b.shape[1] * prod(core.shape[2:])
    inner = computed(shape, lambda t, v: (v.T @ t.flatten(2)).reshape(shape), core, b)
    return LowRank(inner, a.T, 1.0)


@dataclass(frozen=True, slots=True)
class Tokens(SelfContained):
    """Rows of a stored embedding or head, replaced: row ``indices[i]`` becomes row i of ``tensor`` (n, width)."""

    tensor: Ref
    indices: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return -1, self.tensor.shape[1]

    @property
    def parameters(self) -> int:
        return prod(self.tensor.shape)

    def turned(self) -> Tokens:
        raise UnsupportedError(f"{self.tensor.key} replaces rows of a matrix that is stored by columns.")

    def take(self, rows: slice | Sequence[int]) -> Tokens:
        raise UnsupportedError(f"{self.tensor.key} replaces rows of a matrix whose rows the base has in another order.")

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        return TokensKernel(loaded(self.tensor, device, dtype, check), self.indices, strength)


@dataclass(frozen=True, slots=True)
class TokensKernel:
    values: torch.Tensor
    indices: tuple[int, ...]
    strength: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        here = [(i - start, at) for at, i in enumerate(self.indices) if start <= i < start + w.shape[0]]
        if here:
            rows, which = map(list, zip(*here, strict=True))
            w[rows] = w[rows].lerp_(self.values[which], self.strength)


@dataclass(frozen=True, slots=True)
class Hadamard(SelfContained):
    """``first ⊙ second``, entry by entry, of two low-rank products: LoHa, arXiv 2108.06098."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def parameters(self) -> int:
        return self.first.parameters + self.second.parameters

    def turned(self) -> Hadamard:
        return Hadamard(self.first.turned(), self.second.turned())

    def take(self, rows: slice | Sequence[int]) -> Hadamard:
        return Hadamard(self.first.take(rows), self.second.take(rows))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        first, second = self.first, self.second
        b1, a1, b2, a2 = (
            loaded(factor, device, dtype, check).contiguous()
            for factor in (first.lora_B, first.lora_A, second.lora_B, second.lora_A)
        )
        return HadamardKernel(b1, a1, b2, a2, first.scaling * second.scaling * strength)


@dataclass(frozen=True, slots=True)
class HadamardKernel:
    b1: torch.Tensor
    a1: torch.Tensor
    b2: torch.Tensor
    a2: torch.Tensor
    scale: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        rows = slice(start, start + w.shape[0])
        w.addcmul_(self.b1[rows].mm(self.a1), self.b2[rows].mm(self.a2), value=self.scale)


@dataclass(frozen=True, slots=True)
class Kronecker(SelfContained):
    """``scaling · (left ⊗ right)``: LoKr, arXiv 2212.10650. ``order``: which of its rows, where not all as they are."""

    left: Ref
    right: Ref
    scaling: float
    numbers: int
    order: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        (o1, i1), (o2, i2) = self.left.shape, self.right.shape
        return (o1 * o2 if self.order is None else len(self.order)), i1 * i2

    @property
    def parameters(self) -> int:
        return self.numbers

    @property
    def held(self) -> int:
        return prod(self.left.shape) + prod(self.right.shape)

    def turned(self) -> Kronecker:
        if self.order is not None:
            raise UnsupportedError(f"{self.left.key}: a reordered Kronecker product cannot be transposed.")
        return replace(self, left=self.left.T, right=self.right.T)

    def take(self, rows: slice | Sequence[int]) -> Kronecker:
        old = self.order or tuple(range(self.shape[0]))
        return replace(self, order=old[rows] if isinstance(rows, slice) else tuple(old[i] for i in rows))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        left, right = (loaded(r, device, dtype, check).contiguous() for r in (self.left, self.right))
        return KroneckerKernel(left * (self.scaling * strength), right, self.order)


@dataclass(frozen=True, slots=True)
class KroneckerKernel:
    left: torch.Tensor
    right: torch.Tensor
    order: tuple[int, ...] | None

    def apply(self, w: torch.Tensor, start: int) -> None:
        rows = range(start, start + w.shape[0]) if self.order is None else self.order[start : start + w.shape[0]]
        high = self.right.shape[0]
        left, right = self.left[[i // high for i in rows]], self.right[[i % high for i in rows]]
        w.add_((left.unsqueeze(2) * right.unsqueeze(1)).view(w.shape))


@dataclass(frozen=True, slots=True)
class Scaled(SelfContained):
    """``W ⊙ l``: a factor for each output or each input. IA³, arXiv 2205.05638. ``shape`` has -1 for the other side."""

    vector: Ref
    axis: Axis

    @property
    def shape(self) -> tuple[int, int]:
        count = self.vector.shape[0]
        return (count, -1) if self.axis == "out" else (-1, count)

    @property
    def parameters(self) -> int:
        return self.vector.shape[0]

    def turned(self) -> Scaled:
        return replace(self, axis="in" if self.axis == "out" else "out")

    def take(self, rows: slice | Sequence[int]) -> Scaled:
        return replace(self, vector=self.vector.rows(rows)) if self.axis == "out" else self

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        return ScaledKernel(1 + strength * (loaded(self.vector, device, dtype, check) - 1), self.axis)


@dataclass(frozen=True, slots=True)
class ScaledKernel:
    factors: torch.Tensor
    axis: Axis

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.mul_(self.factors if self.axis == "in" else self.factors[start : start + w.shape[0], None])


@dataclass(frozen=True, slots=True)
class Modulated(SelfContained):
    """``W ⊙ (1 + BA)``: HiRA, OpenReview TwJrTz9cRS."""

    factors: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    @property
    def parameters(self) -> int:
        return self.factors.parameters

    def turned(self) -> Modulated:
        return Modulated(self.factors.turned())

    def take(self, rows: slice | Sequence[int]) -> Modulated:
        return Modulated(self.factors.take(rows))

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        a, b = (loaded(f, device, dtype, check).contiguous() for f in (self.factors.lora_A, self.factors.lora_B))
        return ModulatedKernel(a, b, self.factors.scaling * strength)


@dataclass(frozen=True, slots=True)
class ModulatedKernel:
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        w.addcmul_(w, self.b[start : start + w.shape[0]].mm(self.a), value=self.scale)


@dataclass(frozen=True, slots=True)
class Rotated:
    """``l ⊙ (W R)``, l a factor for each output or none: OFT, BOFT, HRA. ``rotation(tensors)`` multiplies rows by R.

    Of a base that stores (in, out) all of W is needed at once, which is then in memory, and W' with it.
    """

    tensors: tuple[Ref, ...]
    rotation: Callable[[Sequence[torch.Tensor]], Callable[[torch.Tensor], torch.Tensor]]
    inputs: int  # -1: the file does not tell
    scale: Ref | None = None
    flipped: bool = False  # of a base that stores (in, out)
    base: Ref | None = None

    @property
    def shape(self) -> tuple[int, int]:
        out = self.scale.shape[0] if self.scale is not None else -1
        return (self.inputs, out) if self.flipped else (out, self.inputs)

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors) + (self.scale.shape[0] if self.scale else 0)

    @property
    def held(self) -> int:
        return 2 * prod(self.base.shape) if self.base is not None else 2 * self.parameters

    def turned(self) -> Rotated:
        return replace(self, flipped=not self.flipped)

    def take(self, rows: slice | Sequence[int]) -> Rotated:
        if self.flipped:
            raise UnsupportedError(f"{self.tensors[0].key} mixes the rows of a matrix that is stored by columns.")
        return replace(self, scale=self.scale.rows(rows)) if self.scale is not None else self

    def onto(self, base: Ref) -> Rotated:
        return replace(self, base=base) if self.flipped else self

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        rotate = self.rotation([loaded(tensor, device, dtype, check) for tensor in self.tensors])
        scale = loaded(self.scale, device, dtype, check).unsqueeze(1) if self.scale is not None else None
        if not self.flipped:
            return RotatedKernel(rotate, scale, strength)
        assert self.base is not None
        new = rotate(self.base.load().to(device=device, dtype=dtype).T.contiguous())
        return TowardKernel((new if scale is None else new * scale).T.contiguous(), strength)


@dataclass(frozen=True, slots=True)
class RotatedKernel:
    rotate: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor | None  # (out, 1)
    strength: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        new = self.rotate(w)
        w.lerp_(new if self.scale is None else new * self.scale[start : start + w.shape[0]], self.strength)


@dataclass(frozen=True, slots=True)
class Sized:
    """A delta whose sizes only the base tells, as ``make(out, in)`` makes it. ``shape`` has -1 for what is unknown."""

    make: Callable[[int, int], Delta]
    shape: tuple[int, int]
    numbers: int
    key: str
    flipped: bool = False  # of a base that stores (in, out)
    order: tuple[int, ...] | None = None

    @property
    def parameters(self) -> int:
        return self.numbers

    @property
    def held(self) -> int:
        return self.parameters

    def turned(self) -> Sized:
        if self.order is not None:
            raise UnsupportedError(f"{self.key}: an update in another order of rows cannot be transposed.")
        return replace(self, shape=self.shape[::-1], flipped=not self.flipped)

    def take(self, rows: slice | Sequence[int]) -> Sized:
        if isinstance(rows, slice):
            raise UnsupportedError(f"{self.key} does not tell its sizes, so no part of what it updates can be taken.")
        return replace(self, order=tuple(rows if self.order is None else (self.order[i] for i in rows)))

    def onto(self, base: Ref) -> Delta:
        rows, columns = base.shape
        delta = self.make(columns, rows).turned() if self.flipped else self.make(rows, columns)
        return (delta if self.order is None else delta.take(self.order)).onto(base)

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        raise UnsupportedError(f"{self.key} does not tell the sizes of what it updates, and no base is at hand.")


@dataclass(frozen=True, slots=True)
class Formula:
    """``result(W, tensors)``: a method that needs all of W at once, which is then in memory, and W' with it."""

    tensors: tuple[Ref, ...]
    result: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
    shape: tuple[int, int]
    flipped: bool = False  # of a base that stores (in, out)
    base: Ref | None = None

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def held(self) -> int:
        return 2 * abs(self.shape[0] * self.shape[1])

    def turned(self) -> Formula:
        return replace(self, shape=self.shape[::-1], flipped=not self.flipped)

    def take(self, rows: slice | Sequence[int]) -> Formula:
        raise UnsupportedError(
            f"{self.tensors[0].key}: this method mixes the rows of a matrix, which the base has in another order. "
            "Merge into the Hugging Face model instead."
        )

    def onto(self, base: Ref) -> Formula:
        return replace(self, base=base)

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        assert self.base is not None
        w = self.base.load().to(device=device, dtype=dtype)
        tensors = [loaded(tensor, device, dtype, check) for tensor in self.tensors]
        new = self.result(w.T, tensors).T if self.flipped else self.result(w, tensors)
        return TowardKernel(new.contiguous(), strength)


@dataclass(frozen=True, slots=True)
class Started:
    """A LoRA that began by taking a part of W for its own, leaving the rest as the base: W' = rest + s·BA.

    ``pissa`` took the r largest singular values (arXiv 2404.02948), ``olora`` s times the first r columns of Q and rows
    of R (arXiv 2406.01775), ``kasa`` threw the r smallest singular values away (arXiv 2412.06071). The part is computed
    again from W in float32 and the rest rounded to W's type, as PEFT does when it loads such an adapter.
    """

    delta: LowRank
    start: Start
    flipped: bool = False  # of a base that stores (in, out)
    base: Ref | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def parameters(self) -> int:
        return self.delta.parameters

    @property
    def held(self) -> int:
        return 2 * self.parameters

    def turned(self) -> Started:
        return replace(self, delta=self.delta.turned(), flipped=not self.flipped)

    def take(self, rows: slice | Sequence[int]) -> Started:
        if isinstance(rows, slice):
            raise UnsupportedError(
                f"{self.delta.lora_A.key}: what {self.start} took of the base cannot be computed from a part of it."
            )
        return replace(self, delta=self.delta.take(rows))  # of a matrix in another order: its factors are too

    def onto(self, base: Ref) -> Started:
        if DTYPES[base.dtype].quantised:
            raise UnsupportedError(
                f"{self.delta.lora_A.key}: '{self.start}' began with a decomposition of the base weight, which cannot "
                f"be computed again from one that is quantised ({base.dtype}). Merge into the original base."
            )
        return replace(self, base=base)

    def kernel(self, strength: float, device: str, dtype: torch.dtype, check: bool = True) -> Kernel:
        import torch

        assert self.base is not None
        rank, w = self.delta.rank, self.base.load().to(device=device, dtype=torch.float32)
        if self.start == "olora":  # PEFT takes W as it is stored
            q, r = torch.linalg.qr(w)
            b, a = q[:, :rank] * self.delta.scaling, r[:rank]
        else:
            u, s, v = torch.linalg.svd(w.T if self.flipped else w, full_matrices=False)
            which = slice(0, rank) if self.start == "pissa" else slice(len(s) - rank, len(s))
            b, a = u[:, which] * s[which], v[which]
            if self.flipped:
                b, a = a.T, b.T
        inner = self.delta.kernel(1.0, device, dtype, check)
        rounding = to_torch(self.base.dtype) if self.base.dtype in ("BF16", "F16") else None
        return StartedKernel(
            inner, LowRankKernel(a.to(dtype).contiguous(), -b.to(dtype).contiguous()), rounding, strength
        )


@dataclass(frozen=True, slots=True)
class StartedKernel:
    gained: Kernel
    taken: Kernel
    rounding: torch.dtype | None
    strength: float

    def apply(self, w: torch.Tensor, start: int) -> None:
        pristine = w.clone() if self.strength != 1.0 else None
        self.taken.apply(w, start)
        if self.rounding is not None:
            w.copy_(w.to(self.rounding))
        self.gained.apply(w, start)
        if pristine is not None:
            w.copy_(pristine.lerp_(w, self.strength))
