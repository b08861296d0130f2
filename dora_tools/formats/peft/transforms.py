"""PEFT's methods that multiply or mix the entries of W, and those that replace a norm or add to a bias."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from ...adapter import Axis, Delta, Dense, LowRank, Replacement, Update
from ...checkpoint import Ref, computed, ref
from ...deltas import Formula, Modulated, Scaled
from ...errors import InputError
from ...names.patterns import compiled
from .keys import Module
from .source import Source, fits

if TYPE_CHECKING:
    import torch


def ia3(source: Source) -> list[Update]:
    """W ⊙ l and b ⊙ l, l one factor for each output; of feed-forward layers W ⊙ l for each input: arXiv 2205.05638."""
    updates: list[Update] = []
    for module in source.modules:
        shape = source.shape(module, "ia3_l")
        if len(shape) == 2 and 1 in shape:
            axis: Axis = "out" if shape[1] == 1 and not (shape[0] == 1 and _feedforward(source, module)) else "in"
            delta: Delta = Scaled(source.tensor(module, "ia3_l", *shape).reshape(-1), axis)
        else:  # (1, n, 1, …) of a convolution
            vector = source.tensor(module, "ia3_l", 1, "channels", *[1] * max(1, len(shape) - 2)).reshape(-1)
            axis = "in" if _feedforward(source, module) else "out"
            delta = Scaled(vector, axis) if axis == "out" else _by_channel(source, module, vector)
        updates.append(source.update(module.path, delta))
        if axis == "out" and isinstance(delta, Scaled):
            updates.append(Update(module.path, delta, kind="whole", parameter="bias", optional=True))
    return updates


def _feedforward(source: Source, module: Module) -> bool:
    """Whether PEFT counts it among the feedforward_modules: by a pattern, or by ends of names."""
    said = source.config.get("feedforward_modules") or []
    if isinstance(said, str):
        return compiled(said, "adapter_config.json: feedforward_modules", 3).fullmatch(module.path) is not None
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise InputError(f"adapter_config.json: feedforward_modules must be a list of names, not {said!r}.")
    return any(module.path == name or module.path.endswith(f".{name}") for name in said)


def _by_channel(source: Source, module: Module, vector: Ref) -> Delta:
    """A factor for each input channel of a convolution, of which an output may see one group only: W ⊙ (1 + BA)."""
    stored = source.stored.get(module.path, ())
    if len(stored) < 3:
        return Scaled(vector, "in")
    channels, out, each = vector.shape[0], stored[0], stored[1]
    groups, area = channels // each, prod(stored[2:])
    fits(module, (out, each), groups * each == channels and out % groups == 0, f"{channels} input channels")

    def inputs(values: torch.Tensor) -> torch.Tensor:
        return (values - 1).reshape(groups, each).repeat_interleave(area, 1)

    def outputs(values: torch.Tensor) -> torch.Tensor:
        return _turns(groups, groups).to(values.dtype).repeat_interleave(out // groups, 0)

    a, b = computed((groups, each * area), inputs, vector), computed((out, groups), outputs, vector)
    return Modulated(LowRank(a, b, 1.0, "none"))


def _turns(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) of zeros, with a 1 at i mod rows in column i."""
    import torch

    return torch.arange(rows).unsqueeze(1) == torch.arange(columns) % rows


def hira(source: Source) -> list[Update]:
    """W ⊙ (1 + BA): OpenReview TwJrTz9cRS. A of a convolution is (r, in, …)."""
    updates = []
    for module in source.modules:
        embedding = "hira_embedding_A" in module.parts
        names = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
        kernel = source.shape(module, names[0])[1:]
        a = source.tensor(module, names[0], "rank", "in", *["kernel"] * (len(kernel) - 1))
        b = source.tensor(module, names[1], "out", a.shape[0], *[1] * (len(kernel) - 1))
        low = LowRank(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1), 1.0, "none")
        if embedding:
            updates.append(Update(module.path, Modulated(low), kind="embedding"))
        else:
            updates.append(source.update(module.path, Modulated(low), kernel if len(kernel) > 1 else ()))
    return updates


def miss(source: Source, leaf: str = "miss_block") -> list[Update]:
    """MiSS, formerly Bone: arXiv 2409.15371.

    W[o, i] + D[i mod r, o]; "mini": W[o, i] + D[i mod r, o mod mini_r]; "bat": every r × r tile T of row block p
    becomes T + T Dₚ + Dₚ.
    """
    way, updates = source.config.get("init_weights"), []
    if leaf != "miss_block":
        source.keys.options["peft_type"] = "MISS"
    for module in source.modules:
        key = module.parts.get(leaf, "")
        source.keys.renamed[key] = key.replace(leaf, "miss_block")
        if way == "bat":
            updates.append(source.update(module.path, _bat(source, module, leaf)))
            continue
        d = source.tensor(module, leaf, "rank", "out")
        rank, out = d.shape

        def repeated(out: int, in_: int, d: Ref = d, module: Module = module) -> LowRank:
            rank, width = d.shape
            fits(module, (out, in_), out % width == 0, f"{width} outputs")
            a = computed((rank, in_), lambda v: _turns(rank, in_).to(v.dtype), d)
            return LowRank(a, computed((out, rank), lambda v: v.T.repeat(out // width, 1), d), 1.0, "none")

        shape = (-1 if way == "mini" else out, -1)
        updates.append(source.update(module.path, source.sized(module, repeated, shape, rank * out)))
    return updates


def _bat(source: Source, module: Module, leaf: str) -> Delta:
    blocks, size, _ = source.shape(module, leaf) if len(source.shape(module, leaf)) == 3 else (0, 0, 0)
    d = source.tensor(module, leaf, "blocks", "size", size)

    def result(w: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        tiles = w.reshape(blocks, size, -1, size).transpose(1, 2)
        (d,) = tensors
        return (tiles + tiles @ d.unsqueeze(1) + d.unsqueeze(1)).transpose(1, 2).reshape(w.shape)

    def make(out: int, in_: int) -> Formula:
        fits(
            module,
            (out, in_),
            out == blocks * size and in_ % size == 0,
            f"{blocks} × {size} outputs, {size} wide tiles",
        )
        return Formula((d,), result, (out, in_))

    return source.sized(module, make, (blocks * size, -1), prod(d.shape))


def road(source: Source) -> list[Update]:
    """Rows i and i + g/2 of each group of g turned as a plane, and scaled; the bias alike: arXiv 2409.00119.

    W'ᵢ = cᵢ Wᵢ − sᵢ Wₖ and W'ₖ = sₖ Wᵢ + cₖ Wₖ, c = α cos θ, s = α sin θ; the variants share θ and α within a pair,
    have one of each for a row, or one for c and one for s.
    """
    variant = source.choice("variant", ("road_1", "road_2", "road_4"))
    group = source.count("group_size", 2)
    updates: list[Update] = []
    for module in source.modules:
        theta = source.tensor(module, "road_theta", "entries")
        alpha = source.tensor(module, "road_alpha", theta.shape[0])
        out = {"road_1": 2 * theta.shape[0], "road_2": theta.shape[0], "road_4": theta.shape[0] // 2}[variant]
        if group % 2 or out % group or (variant == "road_4" and theta.shape[0] % 2):
            raise InputError(f"{theta.key} has {theta.shape[0]} entries, which are no groups of {group} ({variant}).")

        def result(w: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            import torch

            theta, alpha = tensors
            if variant == "road_4":
                (c, s), (one, two) = theta.reshape(-1, 2, group).unbind(1), alpha.reshape(-1, 2, group).unbind(1)
                c, s = (one * c.cos()).reshape(-1, 1), (two * s.sin()).reshape(-1, 1)
            else:
                if variant == "road_1":
                    pairs = (x.reshape(-1, 1, group // 2).expand(-1, 2, -1) for x in (theta, alpha))
                    theta, alpha = (x.reshape(-1) for x in pairs)
                c, s = (alpha * theta.cos()).unsqueeze(1), (alpha * theta.sin()).unsqueeze(1)
            halves = w.reshape(-1, 2, group // 2, w.shape[1])
            turned = torch.stack([-halves[:, 1], halves[:, 0]], 1).reshape(w.shape)
            return c * w + s * turned

        def make(out: int, in_: int, tensors: tuple[Ref, ...] = (theta, alpha)) -> Formula:
            return Formula(tensors, result, (out, in_))

        updates.append(source.update(module.path, source.sized(module, make, (out, -1), 2 * theta.shape[0])))
        bias = Formula((theta, alpha), result, (out, 1))
        updates.append(Update(module.path, bias, kind="whole", parameter="bias", optional=True))
    return updates


def ln_tuning(source: Source) -> list[Update]:
    """Norms trained whole, weight and bias: arXiv 2312.11420. They replace the base's."""
    for module in source.modules:
        for leaf, key in module.parts.items():
            source.checked(key, *["size"] * len(source.checkpoint.tensors[key].shape))
            name = f"{module.path}.{'bias' if leaf.endswith('.bias') else 'weight'}"
            if name in source.keys.replaced:
                raise InputError(f"{key} and {source.keys.replaced[name].tensor.key} are both {name}: which is it?")
            source.keys.replaced[name] = Replacement(ref(source.checkpoint, key))
    return []


def beft(source: Source) -> list[Update]:
    """b + Δ: arXiv 2509.15974."""
    updates = []
    for module in source.modules:
        delta = Dense(source.tensor(module, "beft_bias", 1, "out").reshape(-1, 1))
        updates.append(Update(module.path, delta, kind="whole", parameter="bias"))
    return updates
