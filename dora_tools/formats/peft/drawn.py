"""PEFT's methods whose files leave something to a random generator: projections, or the places of coefficients.

Beside them the methods that store a sparse or a circulant change, which are computed in full as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod, sqrt
from typing import TYPE_CHECKING

from ...adapter import Dense, LowRank, Update
from ...checkpoint import Ref, computed, remembered
from ...errors import FitError, InputError, UnsupportedError
from .keys import Module
from .source import Source, fits
from .wavelets import LOW_PASS, inverse

if TYPE_CHECKING:
    import torch

_MOST = 1 << 29  # numbers that are drawn for one adapter
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def vera(source: Source, name: str = "vera") -> list[Update]:
    """W + diag(b) B diag(d) A, with random A and B for all modules, of which each takes its part: arXiv 2310.11454.

    PVeRA, arXiv 2512.07703, has twice as many d and rows of A; the second halves are of its noise.
    """
    halves, vectors = 2 if name == "pvera" else 1, {}
    for module in source.modules:
        d = source.tensor(module, f"{name}_lambda_d", "rank")
        vectors[module.path] = d, source.tensor(module, f"{name}_lambda_b", "out")
    rows = _only(source, {d.shape[0] for d, _ in vectors.values()})
    if rows % halves:
        raise InputError(f"{name}_lambda_d has {rows} entries, which are not two halves.")
    rank = rows // halves
    saved, drawn = _saved(source, name, (rows, "in"), ("out", rank)), cache(lambda: _drawn(source, rows, rank))
    updates = []
    for module in source.modules:
        d, scale = vectors[module.path]

        def make(out: int, in_: int, d: Ref = d, scale: Ref = scale, module: Module = module) -> LowRank:
            a, b = saved or drawn()
            enough = in_ <= a.shape[1] and out <= b.shape[0]
            fits(module, (out, in_), enough, f"at most {b.shape[0]} outputs and {a.shape[1]} inputs")
            left = computed((out, rank), lambda b, s: b[:out] * s.unsqueeze(1), b, scale)
            right = computed((rank, in_), lambda a, d: a[:rank, :in_] * d[:rank].unsqueeze(1), a, d)
            return LowRank(right, left, 1.0, "none")

        delta = source.sized(module, make, (scale.shape[0], -1), rows + scale.shape[0])
        updates.append(source.update(module.path, delta))
    return updates


def _drawn(source: Source, rows: int, rank: int) -> tuple[Ref, Ref]:
    """VeRA's A and B, drawn again."""
    seed, (out, in_) = _seed(source, "projection_prng_key"), _largest(source)
    shapes = (rows, in_), (out, rank)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        bounds = [sqrt(3.0) * (sqrt(2) / sqrt(columns)) for _, columns in shapes]
        a, b = (torch.empty(s).uniform_(-x, x, generator=generator) for s, x in zip(shapes, bounds, strict=True))
        return a, b

    return _projections(shapes, draw)


def randlora(source: Source) -> list[Update]:
    """W + s Σᵢ Bᵢ Λᵢ A Γᵢ, s = alpha / r, with random Bᵢ and A for all modules, and full rank: arXiv 2502.00987.

    A is of the shorter side of W. (As PEFT flattens i and the ranks of A and B in different orders, what it adds up are
    other pairs than the paper's.)
    """
    alpha, vectors = source.number("randlora_alpha", 640), {}
    for module in source.modules:
        weights = source.tensor(module, "randlora_lambda", "rank", "bases")
        vectors[module.path] = weights, source.tensor(module, "randlora_gamma", weights.shape[1], "shorter side")
    rank = _only(source, {weights.shape[0] for weights, _ in vectors.values()})
    saved, drawn = (
        _saved(source, "randlora", (rank, 1, "short"), ("long", "bases", rank)),
        cache(lambda: _drawn_bases(source, rank)),
    )
    if saved is None and not source.flag("sparse") and not source.flag("very_sparse"):
        source.notes.append(
            "RandLoRA's projections are drawn again in bfloat16, as on a machine for which torch says that it has it; "
            "for one that has not, PEFT draws others. Only save_projection keeps them."
        )
    for_rank = source.scaling("randlora_alpha", alpha, rank)
    updates = []
    for module in source.modules:
        weights, gamma = vectors[module.path]

        def make(out: int, in_: int, weights: Ref = weights, gamma: Ref = gamma, module: Module = module) -> LowRank:
            a, b = saved or drawn()
            (bases, narrow), (short, long) = gamma.shape, sorted((out, in_))
            enough = short == narrow <= a.shape[2] and long <= b.shape[0] and bases <= b.shape[1]
            fits(module, (out, in_), enough, f"a shorter side of {narrow} and a longer one of at most {b.shape[0]}")

            def smaller(a: torch.Tensor, weights: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
                return (weights.unsqueeze(2) * a[:, :, :short] * gamma).flatten(0, 1)

            right = computed((rank * bases, short), smaller, a, weights, gamma)
            left = computed((long, rank * bases), lambda b: b[:long, :bases].flatten(1), b)
            low = LowRank(right, left, *for_rank)
            return low if in_ == short else low.turned()

        numbers = prod(weights.shape) + prod(gamma.shape)
        updates.append(source.update(module.path, source.sized(module, make, (-1, -1), numbers)))
    return updates


def _drawn_bases(source: Source, rank: int) -> tuple[Ref, Ref]:
    """RandLoRA's A and B, drawn again: in bfloat16, or sparse ones of −1 and 1."""
    seed, (short, long) = _seed(source, "projection_prng_key"), sorted(_largest(source))
    very, bases = source.flag("very_sparse"), -(-short // rank)
    one_in = sqrt(short) if very else 3.0 if source.flag("sparse") else 0.0
    shapes = (rank, 1, short), (long, bases, rank)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        if one_in:
            a, b = (_signs(torch.rand(shape, generator=generator), one_in) for shape in shapes)
        else:
            a, *pieces = (
                torch.nn.init.kaiming_uniform_(torch.empty(s, dtype=torch.bfloat16), a=sqrt(5), generator=generator)
                for s in (shapes[0], *[(long, 1, rank)] * bases)
            )
            b = torch.cat(pieces, 1)
        return (a / a.std()).float(), (b / b.std()).float()

    return _projections(shapes, draw)


def _signs(values: torch.Tensor, one_in: float) -> torch.Tensor:
    """−1 and 1 for the smallest and largest of uniform numbers, one in so many in all, and 0 for the others."""
    share = 1 / (2 * one_in)
    return (values > 1 - share).float() - (values < share).float()


def _only(source: Source, ranks: set[int]) -> int:
    """The rank that all modules have. Raises InputError where they have several, or there is no module."""
    if len(ranks) != 1:
        said = " and ".join(map(str, sorted(ranks))) or "no modules, so none"
        raise InputError(
            f"The modules of a {source.config['peft_type']} adapter share their rank; this one has {said}."
        )
    return ranks.pop()


def _saved(
    source: Source, name: str, of_a: tuple[str | int, ...], of_b: tuple[str | int, ...]
) -> tuple[Ref, Ref] | None:
    """The projections of all modules, if they were saved."""
    a, b = source.shared(f"{name}_A", *of_a), source.shared(f"{name}_B", *of_b)
    if (a is None) != (b is None):
        raise InputError(f"The file has one of {name}_A and {name}_B, but not both: it is incomplete.")
    if a is None or b is None:
        _seed(source, "projection_prng_key")
        return None
    return a, b


def _largest(source: Source) -> tuple[int, int]:
    """The largest out and in of all modules, for which projections are drawn. Raises InputError where no base tells."""
    why = "This adapter was saved without its projections (save_projection is false), which are drawn for the largest"
    if source.given.base is None:
        raise InputError(f"{why} of its layers: say --base, which tells their sizes (in Python, Given(base=…)).")
    found = {path: source.sizes(path) for path, _ in source.keys.modules}
    lost = [path for path, sizes in found.items() if sizes is None]
    if lost:
        raise InputError(f"{why} layer, and {lost[0]} is no linear layer of the base. Give the Hugging Face model.")
    sizes = [pair for pair in found.values() if pair is not None]
    return max(out for out, _ in sizes), max(in_ for _, in_ in sizes)


def _projections(shapes: Shapes, draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Ref, Ref]:
    """Two projections that ``draw`` draws one after the other. Raises InputError where they would take gigabytes."""
    numbers = sum(map(prod, shapes))
    if numbers > _MOST:
        raise InputError(f"{numbers:,} random numbers would have to be drawn for the projections of this adapter.")
    a, b = shapes
    return (
        remembered(Ref(a, "F32", lambda: draw()[0], "a projection")),
        remembered(Ref(b, "F32", lambda: draw()[1], "a projection")),
    )


def _seed(source: Source, name: str) -> int:
    return source.count(name, 0, (1 << 63) - 1, 0)


def fourierft(source: Source) -> list[Update]:
    """W + s Re F⁻¹(spectrum), with n trained coefficients at random places: arXiv 2405.03003."""

    def waves(spectrum: torch.Tensor) -> torch.Tensor:
        import torch

        change: torch.Tensor = torch.fft.ifft2(spectrum).real
        return change

    return _spectral(source, "fourierft_spectrum", waves)


def waveft(source: Source) -> list[Update]:
    """W + s · the inverse wavelet transform of n trained coefficients at random places: arXiv 2505.12532.

    Without use_idwt they are the change themselves.
    """
    if not source.flag("use_idwt", True):
        return _spectral(source, "waveft_spectrum", lambda spectrum: spectrum)
    family = source.config.get("wavelet_family", "db1")
    if not isinstance(family, str) or family not in LOW_PASS:
        raise UnsupportedError(
            f"adapter_config.json: wavelet_family is {family!r}; those that PEFT can train are {', '.join(LOW_PASS)}."
        )
    return _spectral(source, "waveft_spectrum", lambda spectrum: inverse(spectrum, LOW_PASS[family]))


def _spectral(source: Source, leaf: str, transform: Callable[[torch.Tensor], torch.Tensor]) -> list[Update]:
    seed, (scaling, _) = _seed(source, "random_loc_seed"), source.scaling("scaling", source.number("scaling"), 1)
    updates = []
    for module in source.modules:
        values = source.tensor(module, leaf, "n")
        count = values.shape[0]

        def make(out: int, in_: int, values: Ref = values, count: int = count, module: Module = module) -> Dense:
            fits(module, (out, in_), count <= out * in_, f"at least {count} entries")

            def dense(values: torch.Tensor) -> torch.Tensor:
                import torch

                places = torch.randperm(out * in_, generator=torch.Generator().manual_seed(seed))[:count]
                spectrum = values.new_zeros(out * in_)
                spectrum[places] = values
                return transform(spectrum.reshape(out, in_))

            return Dense(computed((out, in_), dense, values).times(scaling), count)

        updates.append(source.update(module.path, source.sized(module, make, (-1, -1), count)))
    return updates


def c3a(source: Source) -> list[Update]:
    """W + blocks / in, each block the circulant matrix of its kernel: arXiv 2407.19342."""

    def blocks(kernel: torch.Tensor) -> torch.Tensor:
        import torch

        rows, columns, size = kernel.shape
        shift = (torch.arange(size) - torch.arange(size).unsqueeze(1)) % size
        return kernel[:, :, shift].transpose(1, 2).reshape(rows * size, columns * size) / (columns * size)

    updates = []
    for module in source.modules:
        kernel = source.tensor(module, "c3a_kernel", "blocks of outputs", "blocks of inputs", "size")
        rows, columns, size = kernel.shape
        delta = Dense(computed((rows * size, columns * size), blocks, kernel), prod(kernel.shape))
        updates.append(source.update(module.path, delta))
    return updates


def shira(source: Source) -> list[Update]:
    """W with trained numbers added to some of its entries: arXiv 2406.13175."""
    updates = []
    for module in source.modules:
        values = source.tensor(module, "shira_weight", "n")
        places = source.tensor(module, "shira_indices", 2, values.shape[0], integers=True)

        def make(out: int, in_: int, values: Ref = values, places: Ref = places) -> Dense:
            def dense(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
                rows, columns = indices.long()
                if int(indices.min()) < 0 or int(rows.max()) >= out or int(columns.max()) >= in_:
                    raise FitError(
                        f"{places.key} goes to row {int(rows.max())} and column {int(columns.max())} from "
                        f"{int(indices.min())} on, and the base weight is {out} × {in_}. Is this the right base model?"
                    )
                return values.new_zeros(out, in_).index_put((rows, columns), values, accumulate=True)

            return Dense(computed((out, in_), dense, values, places), values.shape[0])

        updates.append(source.update(module.path, source.sized(module, make, (-1, -1), values.shape[0])))
    return updates
