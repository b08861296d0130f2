"""PEFT's methods that multiply W with rotations and mirrors: OFT, BOFT, HRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt, prod
from typing import TYPE_CHECKING

from ...adapter import Delta, Update
from ...checkpoint import Ref
from ...deltas import Formula, Rotated
from ...errors import InputError, UnsupportedError
from .keys import Module
from .source import Source, fits

if TYPE_CHECKING:
    import torch

    Map = Callable[[torch.Tensor], torch.Tensor]


_OLD_SERIES = (
    "This OFT is of PEFT 0.16 or 0.17, which write no peft_version and double the last term of its series: it is "
    "merged so. PEFT since 0.18 computes it otherwise."
)


def oft(source: Source) -> list[Update]:
    """W Rᵀ with R of rotated blocks: arXiv 2306.07280. Blocks are stored in three ways.

    ``oft_R``, since PEFT 0.16: the upper triangles of antisymmetric Q, which rotate the inputs by a Cayley transform or
    its Neumann series. ``oft_r`` beside ``oft_s``, of 0.14 and 0.15: whole blocks that rotate the inputs, and a factor
    for each output. ``oft_r``, up to 0.13: whole blocks that rotate the outputs, Rᵀ W.
    """
    return [_oft(source, module) for module in source.modules]


def _oft(source: Source, module: Module) -> Update:
    if "oft_s" in module.parts:
        return source.update(module.path, _oft_scaled(source, module))
    if "oft_r" in module.parts:
        return source.update(module.path, _oft_outputs(source, module))
    embedding = "oft_embedding_R" in module.parts
    leaf = "oft_embedding_R" if embedding else "oft_R"
    vectors = source.tensor(module, leaf, "blocks", "entries")
    count, entries = vectors.shape
    size = (1 + isqrt(1 + 8 * entries)) // 2
    if size * (size - 1) // 2 != entries:
        raise InputError(f"{vectors.key} has {entries} entries a block, which no triangle of a square matrix has.")
    shape = source.stored.get(module.path, ())
    if len(shape) > 2 and prod(shape[2:]) != 1:
        raise UnsupportedError(
            f"{module.path} is a convolution of {' × '.join(map(str, shape[2:]))}: PEFT's OFT rotates its patches of "
            "input and adds up where they overlap, which no merged kernel does."
        )
    # PEFT 0.16 and 0.17, which write no peft_version, double the last term of the series as well
    last = 1 if (source.version or (0,)) >= (0, 18) else 2
    terms = source.count("num_cayley_neumann_terms", 1, 1000, 5) if source.flag("use_cayley_neumann", None) else 0
    limit = source.number("eps") / count**0.5 if source.flag("coft") else None
    share = source.flag("block_share") and count == 1
    if last == 2 and terms > 3 and _OLD_SERIES not in source.notes:
        source.notes.append(_OLD_SERIES)

    def rotation(tensors: Sequence[torch.Tensor]) -> Map:
        q = _skew(tensors[0], size)
        q = q if limit is None else _projected(q, limit)
        blocks = _series(q, terms, last) if terms else _cayley(q)
        return _by_blocks(blocks if embedding else blocks.transpose(1, 2), share)

    delta = Rotated((vectors,), rotation, -1 if share else count * size)
    if embedding:
        return Update(module.path, delta.turned(), kind="embedding")
    return source.update(module.path, _multiple(source, module, delta, size) if share else delta)


def _multiple(source: Source, module: Module, delta: Rotated, size: int) -> Delta:
    """A rotation by one block for all, of a base that has a multiple of its inputs."""

    def make(out: int, in_: int) -> Rotated:
        fits(module, (out, in_), in_ % size == 0, f"blocks of {size} inputs")
        return delta

    return source.sized(module, make, delta.shape, delta.parameters)


def _skew(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks, size (size − 1) / 2) → antisymmetric (blocks, size, size), the upper triangle row by row."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(len(vectors), size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.transpose(1, 2)


def _projected(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Constrained OFT: blocks of a greater norm than ``limit`` are shortened to it."""
    import torch

    norms = blocks.norm(dim=(1, 2), keepdim=True)
    return torch.where(norms <= limit, blocks, limit * blocks / norms)


def _cayley(q: torch.Tensor) -> torch.Tensor:
    """(I − Q) (I + Q)⁻¹ of antisymmetric blocks."""
    import torch

    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(q)
    rotation: torch.Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
    return rotation


def _series(q: torch.Tensor, terms: int, last: int) -> torch.Tensor:
    """I + 2Q + 2Q² + … of so many terms, the last one times ``last``; three are computed as four, as PEFT does."""
    import torch

    power = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(q)
    total = power.clone()
    weights = [2] * (terms - 1)
    if terms > 2:
        weights = [2, 2] + ([2] * (terms - 4) + [1] if last == 1 else [2] * (terms - 3))
    for weight in weights:
        power = power @ q
        total += weight * power
    return total


def _by_blocks(blocks: torch.Tensor, share: bool = False) -> Map:
    """Rows times a matrix of diagonal blocks (n, b, b), or of one block over and over."""

    def rotate(w: torch.Tensor) -> torch.Tensor:
        count, size, _ = blocks.shape
        if share:
            return (w.reshape(-1, size) @ blocks[0]).reshape(w.shape)
        return (w.reshape(-1, count, size).transpose(0, 1) @ blocks).transpose(0, 1).reshape(w.shape)

    return rotate


def _half_skew(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks - blocks.transpose(1, 2)) / 2


def _oft_scaled(source: Source, module: Module) -> Delta:
    r = _square_blocks(source, module, "oft_r")
    count, size, _ = r.shape
    scale = _column(source, module, "oft_s")
    share = source.flag("block_share") and count == 1
    coft, eps = source.flag("coft"), source.number("eps", 6e-5)

    def make(out: int, in_: int) -> Rotated:
        fits(module, (out, in_), in_ % size == 0 and (share or in_ == count * size), f"{count} blocks of {size} inputs")
        limit = eps * (-(-out // (in_ // size))) ** 2 / count**0.5 if coft else None

        def rotation(tensors: Sequence[torch.Tensor]) -> Map:
            blocks = tensors[0] if limit is None else _projected(tensors[0], limit)
            return _by_blocks(_cayley(_half_skew(blocks)).transpose(1, 2), share)

        return Rotated((r,), rotation, in_, scale)

    if not share:
        return make(scale.shape[0], count * size)
    return source.sized(module, make, (scale.shape[0], -1), prod(r.shape) + scale.shape[0])


def _oft_outputs(source: Source, module: Module) -> Delta:
    r = _square_blocks(source, module, "oft_r")
    count, size, _ = r.shape
    share, coft = source.flag("block_share") and count == 1, source.flag("coft")
    blocks = source.count("r") if share else count
    eps = source.number("eps", 6e-5)

    def make(out: int, in_: int) -> Formula:
        height = -(-out // blocks)
        fits(module, (out, in_), height == size, f"{blocks} blocks of {size} outputs")
        limit = eps * height**2 / count**0.5 if coft else None

        def result(w: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            stored = tensors[0] if limit is None else _projected(tensors[0], limit)
            rotation = _cayley(_half_skew(stored)).expand(blocks, size, size)
            padded = w.new_zeros(blocks * size, w.shape[1])  # the last block may stick out
            padded[:out] = w
            turned = rotation.transpose(1, 2) @ padded.reshape(blocks, size, -1)
            return turned.reshape(blocks * size, -1)[:out]

        return Formula((r,), result, (out, in_))

    return source.sized(module, make, (-1, -1), prod(r.shape))


def _square_blocks(source: Source, module: Module, leaf: str) -> Ref:
    shape = source.shape(module, leaf)
    return source.tensor(module, leaf, "blocks", "size", shape[1] if len(shape) == 3 else "size")


def _column(source: Source, module: Module, leaf: str) -> Ref:
    """A factor for each output, stored (out, 1) or, of a convolution, (1, out)."""
    shape = source.shape(module, leaf)
    axes = (1, "out") if len(shape) == 2 and shape[0] == 1 else ("out", 1)
    return source.tensor(module, leaf, *axes).reshape(-1)


def boft(source: Source) -> list[Update]:
    """s ⊙ (W Rᵀ), R a product of sparse butterfly rotations: arXiv 2311.06243. The file tells how many there are."""
    updates = []
    for module in source.modules:
        shape = source.shape(module, "boft_R")
        r = source.tensor(module, "boft_R", "factors", "blocks", "size", shape[2] if len(shape) == 4 else "size")
        factors, blocks, size, _ = r.shape
        if "boft_P" in module.parts:  # PEFT up to 0.12; with it the newest would not load the adapter
            key = module.parts.pop("boft_P")
            source.used.add(key)
            source.keys.left_out[key] = "a permutation that follows from the sizes"
        if factors > 1 and (size % 2 or factors > 40 or blocks % 2 ** (factors - 1)):
            raise InputError(f"{r.key} has shape {list(shape)}, which is no butterfly of {factors} factors.")

        def rotation(tensors: Sequence[torch.Tensor]) -> Map:
            return _butterfly([_cayley(_half_skew(factor)) for factor in tensors[0]])

        updates.append(
            source.update(module.path, Rotated((r,), rotation, blocks * size, _column(source, module, "boft_s")))
        )
    return updates


def _butterfly(factors: Sequence[torch.Tensor]) -> Map:
    """Rows times the transposed factors in turn, all but the first on the columns in an order of its own."""
    import torch

    steps = []
    count, size, _ = factors[0].shape
    for i, factor in enumerate(factors):
        order = torch.arange(count * size, device=factor.device)
        if i:  # within runs of 2^i blocks the even half blocks first, then the odd ones
            halves = order.reshape(-1, 2 ** (i + 1), size // 2)
            order = torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).flatten()
        steps.append((order, order.argsort(), _by_blocks(factor.transpose(1, 2))))

    def rotate(w: torch.Tensor) -> torch.Tensor:
        for order, back, by_blocks in steps:
            w = by_blocks(w[:, back])[:, order]
        return w

    return rotate


def hra(source: Source) -> list[Update]:
    """W (I − 2u₁u₁ᵀ) (I − 2u₂u₂ᵀ) … of normalised columns, or W (I − 2UUᵀ) of orthonormal ones: arXiv 2405.17484."""
    gram_schmidt, updates = source.flag("apply_GS"), []
    for module in source.modules:
        u = source.tensor(module, "hra_u", "in", "rank")

        def rotation(tensors: Sequence[torch.Tensor]) -> Map:
            import torch

            (u,) = tensors
            if gram_schmidt:
                basis: torch.Tensor = torch.linalg.qr(u)[0]
                return lambda w: w - 2 * (w @ basis) @ basis.T
            mirrors = (u / u.norm(dim=0)).T

            def reflect(w: torch.Tensor) -> torch.Tensor:
                for mirror in mirrors:
                    w = w - 2 * torch.outer(w @ mirror, mirror)
                return w

            return reflect

        updates.append(source.update(module.path, Rotated((u,), rotation, u.shape[0])))
    return updates
