"""Dimension labels against shapes: what ``["parts*rank", "in"]`` says of a tensor of shape (8, 64).

A dimension is a label, or labels multiplied; ``1`` is one. ``kernel``, at the end, is all further dimensions of a conv
weight multiplied. Labels are shared by the tensors of a module, so each shape helps to solve the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

LABELS = {
    "in": "inputs of the layer (rows of an embedding)",
    "out": "outputs of the layer (width of an embedding)",
    "rank": "rank of the factors: what alpha is divided by",
    "1": "one",
    "k": "the side of a square convolution kernel",
    "kernel": "all kernel dimensions of a conv weight, multiplied",
    "rows": "rows of the parts of a fused layer that have factors, together",
    "part": "rows of one part of a fused layer, where all are equally long",
    "parts": "how many parts of a fused layer have factors",
    "all": "how many parts a fused layer has",
}

Equation = tuple[tuple[int, ...], tuple[str, ...]]  # a shape, and what its dimensions are called


def labels(dim: str) -> list[str]:
    """The labels that a dimension multiplies."""
    return dim.split("*")


def solve(equations: Iterable[Equation], given: dict[str, int]) -> dict[str, int] | None:
    """Every label that the shapes determine, or None where no sizes fit them all."""
    todo: list[tuple[int, list[str]]] = []
    for shape, dims in equations:
        if dims and dims[-1] == "kernel" and len(shape) > len(dims):
            shape = (*shape[: len(dims) - 1], prod(shape[len(dims) - 1 :]))
        if len(shape) != len(dims):
            return None
        todo += [(n, labels(dim)) for n, dim in zip(shape, dims, strict=True)]
    sizes = {"1": 1, **given}
    progress = True
    while progress:
        progress = False
        for n, names in todo:
            known = prod(sizes.get(name, 1) for name in names)
            unknown = [name for name in names if name not in sizes]
            if known == 0 or n % known or (not unknown and n != known):
                return None
            if unknown and len(set(unknown)) == 1:
                root = round((n // known) ** (1 / len(unknown)))
                if root ** len(unknown) != n // known:
                    return None
                sizes[unknown[0]] = root
                progress = True
    if sizes.get("parts", 0) > sizes.get("all", sizes.get("parts", 0)):
        return None
    return sizes


def determined(dims: Iterable[Sequence[str]], sizes: dict[str, int]) -> bool:
    """Whether every label of these dimensions has a size."""
    return all(label in sizes for each in dims for dim in each for label in labels(dim))
