"""The leading singular triplets of X = W' − W, two checkpoints apart: a streamed randomised SVD.

X is never in memory: each pass over it reads both checkpoints tile by tile. Subspace iteration on XᵀX, an orthonormal
basis of the range, and the SVD of the projection (Halko, Martinsson, Tropp, arXiv 0909.4061); ‖X‖² is summed exactly,
so the energy that is kept is not overstated. Each matrix is one thread's, so threads do not change a bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from ..adapter import Axis, Kind, LowRank
from ..checkpoint import Checkpoint, TensorInfo, blocks, constant, single_threaded, tiles
from ..dtypes import working
from ..errors import InputError
from ..lowrank import factors_of
from .ranks import Ranks, Spectrum

Progress = Callable[[int], None]
_OVERSAMPLING = 16
_ITERATIONS = 4  # of subspace iteration
_ROUNDS, _STILL = 40, 3e-6  # of the alternation with a DoRA's scale of each row: at most, and until it moves less


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix to fit: ``name`` in both checkpoints; ``turned``: the update is of its transpose.

    ``scaled``: the stored axis along which a DoRA's magnitude frees the scale ("out": rows), None for LoRA.
    """

    module: str
    name: str
    kind: Kind = "linear"
    turned: bool = False
    kernel_size: tuple[int, ...] = ()
    scaled: Axis | None = None

    def shape(self, info: TensorInfo) -> tuple[int, int]:
        """(out, in) of the update."""
        return (info.width, info.rows) if self.turned else (info.rows, info.width)


@dataclass(frozen=True, slots=True)
class _Fit:
    """X ≈ left · diag(values) · right, in stored orientation; ``total``: ‖X‖²; float64."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    total: float

    def spectrum(self, shape: tuple[int, int]) -> Spectrum:
        return Spectrum(self.values.tolist(), self.total, shape)


class _Pair:
    """X of one matrix: read as rows, as often as needed. ``scale``: c with X = diag(c) W' − W (or W' diag(c) − W)."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, matrix: Matrix, device: str, progress: Progress) -> None:
        self.base, self.tuned, self.matrix, self.device, self.progress = base, tuned, matrix, device, progress
        self.info = base.tensors[matrix.name]
        self.rows, self.width = self.info.rows, self.info.width
        self.scale: torch.Tensor | None = None

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Rows of W and of W'."""
        dtype = working(self.info.dtype)
        size = max((last - first for first, last in tiles(self.info)), default=0) * self.width
        w, v = (torch.empty(size, dtype=dtype, device=self.device) for _ in range(2))
        for first, last in tiles(self.info):
            count = last - first
            old, new = w[: count * self.width].view(count, -1), v[: count * self.width].view(count, -1)
            self.base.read(self.matrix.name, first, last, old)
            self.tuned.read(self.matrix.name, first, last, new)
            if not bool(new.sum().isfinite()):
                raise InputError(f"{self.matrix.name} holds NaN or Inf in the tuned model, or its sum does.")
            self.progress(self.info.bytes_of(count * self.width))
            yield slice(first, last), old, new

    def differences(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, old, new in self.tiles():
            yield rows, self.difference(rows, old, new)

    def difference(self, rows: slice, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """X of these rows, in the place of W'."""
        if self.scale is not None and self.matrix.scaled == "out":
            new.mul_(self.scale[rows].to(new).unsqueeze(1))
        elif self.scale is not None:
            new.mul_(self.scale.to(new))
        return new.sub_(old)


def _fit(pair: _Pair, ranks: Ranks, cap: int, seed: int) -> _Fit:
    """Enough of the SVD of X for the rule: a fixed number of values, or more of them until the energy is there."""
    shape, most = pair.matrix.shape(pair.info), min(cap, pair.rows, pair.width)
    count = most if ranks.rank is not None or ranks.parameters is not None else min(most, 32)
    random = torch.Generator().manual_seed(seed ^ zlib.crc32(pair.matrix.name.encode()))
    basis = torch.empty(pair.width, 0, dtype=torch.float64)
    while True:
        columns = min(count + max(_OVERSAMPLING, count // 4), pair.rows, pair.width)
        fresh = torch.randn(pair.width, columns - basis.shape[1], generator=random, dtype=torch.float64)
        fit, basis = _subspace(pair, torch.cat([basis, fresh], dim=1), count, ranks)
        rank = ranks.of(fit.spectrum(shape))
        if rank is None or rank < count or count >= most:
            return fit
        if ranks.energy is not None and fit.spectrum(shape).kept(count) >= ranks.energy:
            return fit
        count = min(2 * count, most)


def _subspace(pair: _Pair, basis: torch.Tensor, count: int, ranks: Ranks) -> tuple[_Fit, torch.Tensor]:
    """The ``count`` leading triplets of X from a basis of its row space, which is improved on the way."""
    basis, full = torch.linalg.qr(basis)[0], basis.shape[1] >= min(pair.rows, pair.width)
    if pair.matrix.scaled is not None:
        basis = _free_scale(pair, basis, count)
    for _ in range(0 if full and pair.matrix.scaled is None else _ITERATIONS):
        right = basis.to(device=pair.device, dtype=working(pair.info.dtype))
        gram = torch.zeros(pair.width, basis.shape[1], dtype=torch.float64, device=pair.device)
        for _, x in pair.differences():
            gram += (x.T @ (x @ right)).double()
        basis = torch.linalg.qr(gram.cpu())[0]
    right, total = basis.to(device=pair.device, dtype=working(pair.info.dtype)), 0.0
    reached = torch.empty(pair.rows, basis.shape[1], dtype=torch.float64, device=pair.device)
    for rows, x in pair.differences():
        reached[rows] = (x @ right).double()
        total += float(torch.linalg.vector_norm(x, dim=1).double().square().sum())
    left = torch.linalg.qr(reached.cpu())[0]
    of_left = left.to(device=pair.device, dtype=working(pair.info.dtype))
    core = torch.zeros(left.shape[1], pair.width, dtype=torch.float64, device=pair.device)
    for rows, x in pair.differences():
        core += (of_left[rows].T @ x).double()
    q, r = torch.linalg.qr(core.cpu().T)
    u, values, vt = torch.linalg.svd(r.T, full_matrices=False)
    fit = _Fit((left @ u)[:, :count], values[:count], (vt @ q.T)[:count], total)
    return fit, (q @ vt.T)


def _free_scale(pair: _Pair, basis: torch.Tensor, count: int) -> torch.Tensor:
    """Find the scale c of each row (or column) under which X = c W' − W has the lowest rank; returns a row basis.

    A DoRA's W' is m ⊙ V/‖V‖ with V = W + s·BA, so c = ‖V‖/m, which nobody stored. Outside the update's row space V
    and W agree, hence c = ⟨w, w⟩/⟨w, w'⟩ there (which of all c brings V's direction nearest to that of w'); the row
    space and c improve each other.
    """
    along_rows, dtype = pair.matrix.scaled == "out", working(pair.info.dtype)
    known = torch.empty(pair.width if along_rows else pair.rows, 0, dtype=torch.float64)
    pair.scale = _scale(pair, known)
    for _ in range(_ROUNDS):
        right = basis.to(device=pair.device, dtype=dtype)
        gram = torch.zeros(pair.width, basis.shape[1], dtype=torch.float64, device=pair.device)
        reached = torch.empty(pair.rows, basis.shape[1], dtype=torch.float64, device=pair.device)
        for rows, x in pair.differences():
            product = x @ right
            reached[rows] = product.double()
            gram += (x.T @ product).double()
        u, _, _ = torch.linalg.svd(gram.cpu(), full_matrices=False)
        basis = u
        known = u[:, :count] if along_rows else torch.linalg.svd(reached.cpu(), full_matrices=False)[0][:, :count]
        before, pair.scale = pair.scale, _scale(pair, known)
        if bool(((pair.scale - before).abs() <= _STILL * before.abs()).all()):
            break
    return basis


def _scale(pair: _Pair, known: torch.Tensor) -> torch.Tensor:
    """c of every row or column, with what lies in the space of ``known`` (orthonormal columns) left out."""
    along_rows, dtype = pair.matrix.scaled == "out", working(pair.info.dtype)
    size, space = (pair.rows if along_rows else pair.width), known.to(device=pair.device, dtype=dtype)
    dots, squares = (torch.zeros(size, dtype=torch.float64, device=pair.device) for _ in range(2))
    of_old, of_new = (torch.zeros(known.shape[1], size, dtype=torch.float64, device=pair.device) for _ in range(2))
    for rows, old, new in pair.tiles():
        if along_rows:
            dots[rows], squares[rows] = (old * new).sum(1).double(), (old * old).sum(1).double()
            of_old[:, rows], of_new[:, rows] = (old @ space).T.double(), (new @ space).T.double()
        else:
            dots += (old * new).sum(0).double()
            squares += (old * old).sum(0).double()
            of_old += (space[rows].T @ old).double()
            of_new += (space[rows].T @ new).double()
    outside, rest = dots - (of_old * of_new).sum(0), squares - of_old.square().sum(0)
    # where next to nothing is outside, or the two are opposed there, any scale will do
    told = (rest > 1e-5 * squares) & (outside > 1e-5 * dots.abs())
    return torch.where(told, rest / outside, torch.ones_like(dots)).cpu()


def fits(
    base: Checkpoint,
    tuned: Checkpoint,
    matrices: Sequence[Matrix],
    ranks: Ranks,
    *,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """The nearest update of every matrix at its rank, and ‖X‖ of each, by module.

    ``progress`` is called with the bytes read of the base, in many passes. Raises FitError for impossible ranks,
    InputError for NaN and Inf.
    """
    shapes = {m.module: m.shape(base.tensors[m.name]) for m in matrices}
    caps = {module: ranks.cap(shape, shapes) for module, shape in shapes.items()}

    def one(matrix: Matrix) -> _Fit:
        single_threaded()
        return _fit(_Pair(base, tuned, matrix, device, progress), ranks, caps[matrix.module], seed)

    made: dict[str, LowRank] = {}
    kept: dict[str, _Fit] = {}
    totals: dict[str, float] = {}
    by_size = sorted(matrices, key=lambda m: -base.tensors[m.name].nbytes)
    for matrix, fit in blocks(by_size, one, threads):
        kept[matrix.module], totals[matrix.module] = fit, sqrt(fit.total)
        rank = ranks.of(fit.spectrum(shapes[matrix.module]))
        if rank is not None:
            made[matrix.module] = _update(matrix, kept.pop(matrix.module), rank)
    if kept:
        of = {m.module: m for m in matrices}
        while True:
            chosen = ranks.choose({module: kept[module].spectrum(shapes[module]) for module in shapes})
            full = {module: min(*shapes[module], ranks.most or max(shapes[module])) for module in shapes}
            short = [m for m in by_size if chosen[m.module] == len(kept[m.module].values) < full[m.module]]
            if not short:
                break
            for m in short:  # it would take more than is known of it
                caps[m.module] = min(2 * caps[m.module], full[m.module])
            kept |= {m.module: fit for m, fit in blocks(short, one, threads)}
        made = {module: _update(of[module], fit, chosen[module]) for module, fit in kept.items()}
    return made, totals


def _update(matrix: Matrix, fit: _Fit, rank: int) -> LowRank:
    a, b = factors_of(fit.left, fit.values, fit.right, min(rank, fit.values.shape[0]))
    a, b = (b.T.contiguous(), a.T.contiguous()) if matrix.turned else (a, b)
    return LowRank(constant(a, f"{matrix.module}.lora_A"), constant(b, f"{matrix.module}.lora_B"), 1.0, "1, fitted")
