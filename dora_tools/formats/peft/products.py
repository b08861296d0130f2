"""PEFT's methods that add a product of stored matrices: by entries, by blocks, or of low rank."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ...adapter import Dense, LowRank, Update
from ...checkpoint import Ref, computed
from ...deltas import Hadamard, Kronecker, multiplied, tucker
from ...errors import InputError
from .keys import Module
from .source import Scales, Source

if TYPE_CHECKING:
    import torch


def loha(source: Source) -> list[Update]:
    """W + s (B₁A₁) ⊙ (B₂A₂), s = alpha / r: arXiv 2108.06098. The factors of a convolution may be Tucker's."""
    scales, updates = Scales(source), []
    for module in source.modules:
        pairs: list[LowRank] = []
        kernel: tuple[int, ...] = ()
        for n in "12":
            if f"hada_t{n}" in module.parts:
                low, kernel = _tucker(source, module, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b")
            else:
                low = source.product(module, f"hada_w{n}_a", f"hada_w{n}_b")
            pairs.append(low)
        if pairs[0].shape != pairs[1].shape:
            raise InputError(
                f"{module.path}: the two products of LoHa have shapes {list(pairs[0].shape)} and "
                f"{list(pairs[1].shape)}, which must be equal ({', '.join(module.parts.values())})."
            )
        scaling, said = scales.scaling(module.path, pairs[0].rank)
        first = LowRank(pairs[0].lora_A, pairs[0].lora_B, scaling, said)
        updates.append(source.update(module.path, Hadamard(first, pairs[1]), kernel))
    scales.close()
    return updates


def lokr(source: Source) -> list[Update]:
    """W + s w₁ ⊗ w₂, s = alpha / r, or 1 up to PEFT 0.13: arXiv 2212.10650. Either may be a product of two matrices."""
    version, updates = source.version, []
    scales = Scales(source, version < (0, 14) if version else "rank_dropout_scale" not in source.config)
    for module in source.modules:
        left, flat = source.whole(module, "lokr_w1"), True
        kernel: tuple[int, ...] = ()
        ranks = {source.tensor(module, f"lokr_w{n}_b", "rank", "in").shape[0] for n in "12"
                 if f"lokr_w{n}_b" in module.parts and f"lokr_w{n}" not in module.parts}  # fmt: skip
        if len(ranks) > 1:
            raise InputError(f"{module.path}: the factors of LoKr have ranks {' and '.join(map(str, sorted(ranks)))}.")
        if "lokr_t2" in module.parts:
            low, kernel = _tucker(source, module, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
            right = multiplied(low)
        elif "lokr_w2" in module.parts and len(source.shape(module, "lokr_w2")) > 2:
            axes = source.shape(module, "lokr_w2")
            stored = source.tensor(module, "lokr_w2", "out", "in", *["kernel"] * (len(axes) - 2))
            right, kernel, flat = stored.reshape(axes[0], -1), axes[1:], len(axes) != 3
        else:
            right = source.whole(module, "lokr_w2")
        kernel = (left.shape[1] * kernel[0], *kernel[1:]) if kernel else ()
        numbers = sum(prod(source.shape(module, leaf)) for leaf in module.parts)
        scaling, _ = scales.scaling(module.path, next(iter(ranks), None))
        if flat:
            updates.append(source.update(module.path, Kronecker(left, right, scaling, numbers), kernel))
            continue
        # PEFT multiplies a w2 of three axes (Conv1d) with a matrix as if that were (1, out, in), and reshapes
        shape = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]

        def entries(one: torch.Tensor, two: torch.Tensor, axes: tuple[int, ...] = axes) -> torch.Tensor:
            import torch

            return torch.kron(one.contiguous(), two.reshape(axes)).reshape(one.shape[0] * axes[0], -1)

        updates.append(
            source.update(module.path, Dense(computed(shape, entries, left, right).times(scaling), numbers), kernel)
        )
    scales.close()
    return updates


def _tucker(source: Source, module: Module, core: str, a: str, b: str) -> tuple[LowRank, tuple[int, ...]]:
    """A core (r, r, height, width) with factors (r, out) and (r, in), as a product for the flat kernel; (in, …)."""
    middle = source.tensor(module, core, "rank", "rank", "height", "width")
    first, second, *kernel = middle.shape
    left, right = source.tensor(module, a, first, "out"), source.tensor(module, b, second, "in")
    return tucker(middle, left, right), (right.shape[1], *kernel)


def adalora(source: Source) -> list[Update]:
    """W + s / (init_r + 1e-5) · B (E ⊙ A), s = lora_alpha: arXiv 2303.10512. A module may have lost all its ranks."""
    alpha, rank = source.number("lora_alpha", 8), source.count("init_r", default=12)
    scaling = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    updates = []
    for module in source.modules:
        if 0 in source.shape(module, "lora_A"):
            for leaf, sizes in (("lora_A", (0, "in")), ("lora_B", ("out", 0)), ("lora_E", (0, 1))):
                source.tensor(module, leaf, *sizes)
                source.keys.left_out[module.parts[leaf]] = "AdaLoRA has pruned all ranks of this module"
            continue
        a = source.tensor(module, "lora_A", "rank", "in")
        b = source.tensor(module, "lora_B", "out", a.shape[0])
        e = source.tensor(module, "lora_E", a.shape[0], 1)
        scaled = computed(a.shape, lambda a, e: a * e, a, e)
        updates.append(source.update(module.path, LowRank(scaled, b, scaling, f"{alpha:g}/({rank} + 1e-5)")))
    return updates


def delora(source: Source) -> list[Update]:
    """W + B diag(λ / (r ‖Aᵢ‖ ‖Bᵢ‖)) A diag(ω), norms at least 1e-4: arXiv 2503.18225."""
    updates = []
    for module in source.modules:
        a = source.tensor(module, "delora_A", "rank", "in")
        b = source.tensor(module, "delora_B", "out", a.shape[0])
        strength = source.tensor(module, "delora_lambda", 1)
        columns = source.tensor(module, "delora_w_norm", a.shape[1])

        def weighed(a: torch.Tensor, b: torch.Tensor, strength: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            norms = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
            scaled: torch.Tensor = (strength / len(a) / norms).unsqueeze(1) * a * columns
            return scaled

        low = LowRank(computed(a.shape, weighed, a, b, strength, columns), b, 1.0, "its own strength")
        updates.append(source.update(module.path, low))
    return updates


def gralora(source: Source) -> list[Update]:
    """A LoRA of rank r / k for each of k × k blocks, beside one of the whole, times alpha / (r + its rank): arXiv
    2505.20355."""
    alpha, updates = source.number("alpha", 64), []
    for module in source.modules:
        a = source.tensor(module, "gralora_A", "blocks", "in", "rank")
        count, width, rank = a.shape
        b = source.tensor(module, "gralora_B", count, rank, "out")
        each, height = rank // count, b.shape[2]
        if rank % count:
            raise InputError(f"{module.parts['gralora_A']} has rank {rank}, which is not a multiple of {count} blocks.")
        general = [leaf for leaf in ("gralora_A_general", "gralora_B_general") if leaf in module.parts]
        whole: tuple[Ref, ...] = ()
        if general:
            first = source.tensor(module, "gralora_A_general", "rank", count * width)
            whole = first, source.tensor(module, "gralora_B_general", count * height, first.shape[0])
        hybrid = whole[0].shape[0] if whole else 0

        # rank s of chunk j of input block n goes to output block j, by rank s of chunk n there
        def inputs(a: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
            n, w, r = a.shape
            rows = a.new_zeros(n, n, r // n, n, w)
            for block in range(n):
                rows[block, :, :, block] = a[block].T.reshape(n, r // n, w)
            return _stacked(rows.reshape(n * r, n * w), beside)

        def outputs(b: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
            n, r, h = b.shape
            rows = b.new_zeros(n, n, r // n, n, h)
            for block in range(n):
                rows[:, block, :, block] = b[block].reshape(n, r // n, h)
            return _stacked(rows.reshape(n * r, n * h), [two.T for two in beside]).T

        total = count * count * each + hybrid
        low = LowRank(
            computed((total, count * width), inputs, a, *whole[:1]),
            computed((count * height, total), outputs, b, *whole[1:]),
            *source.scaling("alpha", alpha, rank + hybrid),
        )
        updates.append(source.update(module.path, low))
    return updates


def _stacked(one: torch.Tensor, others: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    import torch

    return torch.cat([one, *others])


def vblora(source: Source) -> list[Update]:
    """W + BA, whose pieces are mixtures of the top-k vectors of one bank: arXiv 2405.15179."""
    bank = source.shared("vblora_vector_bank", "vectors", "length")
    if bank is None:
        raise InputError("The file has no vblora_vector_bank: it is incomplete.")
    vectors, length = bank.shape
    topk = source.count("topk", 1, vectors, 2)
    updates = []
    for module in source.modules:
        mixtures: list[tuple[tuple[int, ...], tuple[Ref, ...]]] = []
        for leaf in ("vblora_logits_A", "vblora_logits_B"):
            if leaf in module.parts:
                logits = source.tensor(module, leaf, "rows", "pieces", vectors)
                mixtures.append((logits.shape, (bank, logits)))
            else:
                shares = source.tensor(module, f"{leaf}_topk_weights", "rows", "pieces", topk - 1)
                which = source.tensor(module, f"{leaf}_topk_indices", *shares.shape[:2], topk, integers=True)
                mixtures.append((shares.shape, (bank, shares, which)))
        (a, of_a), (b, of_b) = mixtures
        if a[0] != b[1]:
            raise InputError(f"{module.path}: its logits are of rank {a[0]} for A and {b[1]} for B.")

        def left(*parts: torch.Tensor) -> torch.Tensor:
            return _mixed(topk, *parts).transpose(1, 2).flatten(0, 1)

        def right(*parts: torch.Tensor) -> torch.Tensor:
            return _mixed(topk, *parts).flatten(1)

        low = LowRank(
            computed((a[0], a[1] * length), right, *of_a), computed((b[0] * length, b[1]), left, *of_b), 1.0, "none"
        )
        updates.append(source.update(module.path, low))
    return updates


def _mixed(topk: int, bank: torch.Tensor, scores: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, pieces, length): mixtures of the bank's vectors by logits, or by stored shares, of which the last is the
    rest of 1."""
    import torch

    if which is None:
        values, index = scores.topk(topk)
        shares = values.softmax(-1)
    else:
        index = which.long()
        shares = torch.cat([scores, 1 - scores.sum(-1, keepdim=True)], -1)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(bank):
            raise InputError(f"The adapter chooses vector {int(index.max())} of a bank of {len(bank)}.")
    return (shares.unsqueeze(-1) * bank[index]).sum(-2)
