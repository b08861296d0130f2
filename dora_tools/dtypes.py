"""Stored number types: how many bytes they take, and how a block of rows becomes float32 and back.

Names are those of the safetensors header. A type that stores several elements in one block (``F4``: two in a byte)
has ``block > 1``. Torch is imported when a value is decoded, never to know a size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InputError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One stored type: ``nbytes`` bytes hold ``block`` consecutive elements; ``torch`` is its name in torch."""

    name: str
    nbytes: int
    torch: str | None
    block: int = 1
    floating: bool = False


_TYPES = (
    DType("F64", 8, "float64", floating=True),
    DType("F32", 4, "float32", floating=True),
    DType("F16", 2, "float16", floating=True),
    DType("BF16", 2, "bfloat16", floating=True),
    DType("F8_E4M3", 1, "float8_e4m3fn"),
    DType("F8_E5M2", 1, "float8_e5m2"),
    DType("F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
    DType("F8_E8M0", 1, "float8_e8m0fnu"),
    DType("F6_E2M3", 3, None, block=4),
    DType("F6_E3M2", 3, None, block=4),
    DType("F4", 1, None, block=2),
    DType("C64", 8, "complex64"),
    DType("I64", 8, "int64"),
    DType("U64", 8, "uint64"),
    DType("I32", 4, "int32"),
    DType("U32", 4, "uint32"),
    DType("I16", 2, "int16"),
    DType("U16", 2, "uint16"),
    DType("I8", 1, "int8"),
    DType("U8", 1, "uint8"),
    DType("BOOL", 1, "bool"),
)
DTYPES = {t.name: t for t in _TYPES}
_BY_TORCH = {t.torch: t.name for t in _TYPES if t.torch}
_ALIASES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16"}


def dtype_named(text: str) -> str:
    """The stored type that a user means by ``float32``, ``fp32``, ``f32``, ``torch.float32`` or ``F32``.

    Only types that a merged weight can be rounded to are accepted. Raises UsageError otherwise.
    """
    key = text.removeprefix("torch.").lower()
    name = _BY_TORCH.get(key) or _ALIASES.get(key) or key.upper()
    if name not in DTYPES or not DTYPES[name].floating:
        allowed = ", ".join(t.torch for t in _TYPES if t.floating and t.torch)
        raise UsageError(f"'{text}' is not a type that weights can be written in; use one of {allowed}.")
    return name


def of_torch(dtype: torch.dtype) -> str:
    """The stored name of a torch dtype."""
    name = _BY_TORCH.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise InputError(f"Tensors of type {dtype} cannot be stored: no name in safetensors.")
    return name


def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a stored type. Raises InputError where torch has none (F4, F6)."""
    import torch

    attribute = DTYPES[name].torch
    dtype = getattr(torch, attribute, None) if attribute else None
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"Values stored as {name} cannot be decoded by torch {torch.__version__}.")
    return dtype


def working(name: str) -> torch.dtype:
    """The torch dtype that stored values are decoded to: float32, or float64, complex and integers as they are."""
    import torch

    return torch.float32 if (DTYPES[name].floating and name != "F64") or name.startswith("F8") else to_torch(name)


def decode(raw: torch.Tensor, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values in ``raw`` (uint8, contiguous, 1-D) as float32; float64, complex and integers as they are.

    With ``out`` (any shape of the right number of elements, on any device) they are converted into it instead.
    """
    values = raw.view(to_torch(name))
    return out.copy_(values.view(out.shape)) if out is not None else values.to(working(name))


def encode(values: torch.Tensor, name: str, raw: torch.Tensor) -> None:
    """Round ``values`` once to the stored type and put its bytes into ``raw`` (uint8, contiguous, 1-D)."""
    raw.view(to_torch(name)).copy_(values.reshape(-1))
