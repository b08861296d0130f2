"""The mathematics, as the papers write it, on tensors.

W (out, in); lora_A (rank, in); lora_B (out, rank); V = W + s·BA; m, n: magnitude and norms of V along one axis.
Everything here is float32 unless W is float64, and knows no names and no files.
"""

from __future__ import annotations

import torch

from .adapter import Axis, EpsRule


def row_norms(v: torch.Tensor) -> torch.Tensor:
    """‖V‖ of each row: the norm that merge, to-dora and verify share. ``v`` (rows, width) → (rows,)."""
    norms: torch.Tensor = torch.linalg.vector_norm(v, dim=1)
    return norms


def column_squares(v: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Σ v² of each column of one tile, as float64 so that tiles can be added up. ``v`` (rows, width) → (width,)."""
    return torch.mul(v, v, out=scratch).sum(0).double()


def factors(m: torch.Tensor, n: torch.Tensor, eps: float = 0.0, eps_rule: EpsRule = "add") -> tuple[torch.Tensor, int]:
    """m / n, and 1 where n = 0 (a row without direction stays as it is); with the number of such places.

    ``eps`` keeps n from 0 the way the trainer did: added to it, or as its least value.
    """
    zero = n == 0
    count = int(zero.sum())
    if eps:
        n = n + eps if eps_rule == "add" else n.clamp_min(eps)
    ratio = m / n
    return (torch.where(zero, torch.ones_like(ratio), ratio) if count else ratio), count


def reference_merge(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
    axis: Axis = "out",
) -> torch.Tensor:
    """The unblocked merge, step by step as PEFT's ``merge_and_unload`` runs it, rounded once to ``weight.dtype``.

    The full product BA first, then s, then W; the tests' oracle, bit-identical to PEFT on the CPU. All (out, in).
    """
    v = weight.float() + (lora_B.float() @ lora_A.float()) * scaling
    if magnitude is not None:
        dim = 1 if axis == "out" else 0
        norm = torch.linalg.norm(v, dim=dim)
        v = (magnitude.float() / norm).unsqueeze(dim) * v
    return v.to(weight.dtype)


def svd_of_product(
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float = 1.0,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, k), σ (k,) descending, Vᵀ (k, in) of diag(rows) · s·BA · diag(columns), float64, k ≤ rank.

    By thin QR of both factors and the SVD of a rank × rank core: the product is never formed. Factors may be
    rank-deficient or wider than the matrix. O((out + in) · rank²).
    """
    b = lora_B.double() if rows is None else lora_B.double() * rows.double().unsqueeze(1)
    a = lora_A.double() if columns is None else lora_A.double() * columns.double()
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, values, vt = torch.linalg.svd(scaling * (rb @ ra.T), full_matrices=False)
    return qb @ u, values, vt @ qa.T


def factors_of(
    u: torch.Tensor,
    values: torch.Tensor,
    vt: torch.Tensor,
    rank: int,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (rank, in), lora_B (out, rank) of the best approximation of that rank: √σ on each side, scaling 1.

    ``rows``, ``columns``: the weights that the SVD was taken under. Ranks beyond the spectrum are zeros. float32.
    """
    k = min(rank, values.shape[0])
    root = values[:k].sqrt()
    b, a = u[:, :k] * root, root.unsqueeze(1) * vt[:k]
    b = b if rows is None else b / rows.double().unsqueeze(1)
    a = a if columns is None else a / columns.double()
    return padded(a.float(), b.float(), rank)


def padded(lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product at a higher rank: rows and columns of zeros."""
    more = rank - lora_A.shape[0]
    if more <= 0:
        return lora_A.contiguous(), lora_B.contiguous()
    a = torch.cat([lora_A, lora_A.new_zeros(more, lora_A.shape[1])])
    return a, torch.cat([lora_B, lora_B.new_zeros(lora_B.shape[0], more)], dim=1)
