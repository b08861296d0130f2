"""Stored number types: how many bytes they take, and how a block of rows becomes float32 and back.

Names are those of the safetensors header, and ggml's for the types of GGUF files. A type that stores several elements
in one block (``F4``: two in a byte, ``Q8_0``: 32 in 34 bytes) has ``block > 1``. Torch is imported when a value is
decoded, never to know a size; so are gguf (all that its types can decode, and the plain ones back) and libgguf (the
K-quants).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    import torch

    Blocks = numpy.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class DType:
    """One stored type: ``nbytes`` bytes hold ``block`` consecutive elements; ``torch`` is its name in torch.

    ``floating``: it holds fractions that an update can be added to. ``ggml``: its number in a GGUF file, -1 for none.
    """

    name: str
    nbytes: int
    torch: str | None
    block: int = 1
    floating: bool = False
    ggml: int = -1

    @property
    def quantised(self) -> bool:
        """Whether it is one of ggml's block types, which gguf decodes."""
        return self.floating and self.torch is None


_GGML = (
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
)  # number, name, elements and bytes of a block: what gguf can decode
_TYPES = (
    DType("F64", 8, "float64", floating=True, ggml=28),
    DType("F32", 4, "float32", floating=True, ggml=0),
    DType("F16", 2, "float16", floating=True, ggml=1),
    DType("BF16", 2, "bfloat16", floating=True, ggml=30),
    DType("F8_E4M3", 1, "float8_e4m3fn"),
    DType("F8_E5M2", 1, "float8_e5m2"),
    DType("F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
    DType("F8_E8M0", 1, "float8_e8m0fnu"),
    DType("F6_E2M3", 3, None, block=4),
    DType("F6_E3M2", 3, None, block=4),
    DType("F4", 1, None, block=2),
    DType("C64", 8, "complex64"),
    DType("I64", 8, "int64", ggml=27),
    DType("U64", 8, "uint64"),
    DType("I32", 4, "int32", ggml=26),
    DType("U32", 4, "uint32"),
    DType("I16", 2, "int16", ggml=25),
    DType("U16", 2, "uint16"),
    DType("I8", 1, "int8", ggml=24),
    DType("U8", 1, "uint8"),
    DType("BOOL", 1, "bool"),
    *(DType(name, nbytes, None, block, True, number) for number, name, block, nbytes in _GGML),
    DType("Q8_K", 292, None, 256, ggml=15),
    DType("Q1_0", 18, None, 128, ggml=41),
)
DTYPES = {t.name: t for t in _TYPES}
GGML = {t.ggml: t.name for t in _TYPES if t.ggml >= 0}
_BY_TORCH = {t.torch: t.name for t in _TYPES if t.torch}
GGUF_WRITES = frozenset(["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
LIBGGUF_WRITES = frozenset(["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
_ALIASES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16"}


def dtype_named(text: str) -> str:
    """The stored type that a user means by ``float32``, ``fp32``, ``f32``, ``torch.float32`` or ``F32``.

    Only types that a merged weight can be rounded to are accepted. Raises UsageError otherwise.
    """
    key = text.removeprefix("torch.").lower()
    name = _BY_TORCH.get(key) or _ALIASES.get(key) or key.upper()
    if name not in DTYPES or not (DTYPES[name].floating and DTYPES[name].torch):
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
    values = _dequantised(raw, name) if DTYPES[name].quantised else raw.view(to_torch(name))
    return out.copy_(values.view(out.shape)) if out is not None else values.to(working(name))


def encode(values: torch.Tensor, name: str, raw: torch.Tensor) -> None:
    """Round ``values`` once to the stored type and put its bytes into ``raw`` (uint8, contiguous, 1-D).

    Raises ResourceError for a K-quant without libgguf, and InputError for a type that nothing here can write.
    """
    if DTYPES[name].quantised:
        _quantise(values, name, raw)
    else:
        raw.view(to_torch(name)).copy_(values.reshape(-1))


_SLAB = 1 << 16  # elements in one go of gguf's numpy code: its temporaries stay in cache


def _dequantised(raw: torch.Tensor, name: str) -> torch.Tensor:
    import torch
    from gguf import GGMLQuantizationType, quants

    kind = DTYPES[name]
    values = torch.empty(raw.numel() // kind.nbytes * kind.block, dtype=torch.float32)
    step = max(1, _SLAB // kind.block)
    source, target = raw.numpy().reshape(-1, kind.nbytes), values.numpy().reshape(-1, kind.block)
    for first in range(0, len(source), step):
        blocks = source[first : first + step]
        decoded = quants.dequantize(blocks.reshape(1, -1), GGMLQuantizationType[name])
        target[first : first + step] = decoded.reshape(-1, kind.block)
    return values


def _quantise(values: torch.Tensor, name: str, raw: torch.Tensor) -> None:
    quantise = _quantiser(name)
    kind = DTYPES[name]
    source = values.cpu().float().numpy().reshape(-1, kind.block)
    target = raw.numpy().reshape(-1, kind.nbytes)
    step = max(1, _SLAB // kind.block)
    for first in range(0, len(source), step):
        blocks = source[first : first + step]
        target[first : first + step] = quantise(blocks.reshape(1, -1)).reshape(-1, kind.nbytes)


@cache
def _quantiser(name: str) -> Callable[[Blocks], Blocks]:
    """Rows of float32 → their bytes: gguf where it can write the type, else libgguf. Raises as ``encode`` does."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    if name in GGUF_WRITES:
        return lambda rows: quants.quantize(rows, kind)
    if name not in LIBGGUF_WRITES:
        raise InputError(f"Nothing here can write weights as {name}; llama.cpp's llama-quantize can.")
    try:
        import libgguf
    except ImportError as error:
        raise ResourceError(f"Writing {name} needs libgguf: pip install 'dora-tools[quantize]'.") from error
    import numpy

    return lambda rows: numpy.asarray(libgguf.quantize_rows(rows, kind))
