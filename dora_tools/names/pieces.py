"""An update or a trained tensor of the model at run time that a base has in several tensors, or within a larger one.

Transformers 5 stacks the experts of a layer to one parameter, (expert, …), and joins gate and up; files mostly have a
matrix for each expert. ``moved`` says which tensor is which piece; this turns that into rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..adapter import Adapter, Delta, Replacement, Update
from ..checkpoint import TensorInfo
from ..errors import FitError, UnsupportedError
from .moved import Piece

Found = Sequence[tuple[str, Piece | None]]


def expert_of(update: Update) -> tuple[str, int]:
    """Of an update of kind "expert": the parameter that stacks the matrices, and which of them it is."""
    module, _, parameter = update.module.rpartition(".")
    path, _, number = module.rpartition(".")
    return f"{path}.{parameter}", int(number)


def shape_of(found: Found, known: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """The shape that the parameter has at run time; None where its pieces do not tell."""
    if len(found) == 1 and (found[0][1] is None or _as_it_may_be(found[0][1])):
        return known[found[0][0]].shape
    pieces = [(known[name].shape, piece) for name, piece in found if piece is not None]
    if not pieces or any(p.unknown or p.whole_on_disk or p.turned is None or len(s) < 2 for s, p in pieces):
        return None
    experts = [p.expert for _, p in pieces]
    shapes = [(*s[:-2], s[-1], s[-2]) if p.turned else s for s, p in pieces if p.expert == experts[0]]
    stacked = experts[0] is not None
    first = list(shapes[0])
    dim = pieces[0][1].dim - stacked
    if dim >= 0:
        first[dim] = sum(shape[dim] for shape in shapes)
    return (max(e or 0 for e in experts) + 1, *first) if stacked else tuple(first)


def _as_it_may_be(piece: Piece) -> bool:
    """The same tensor, which may be stored as its transpose: its shape tells, if it is not square."""
    return piece.turned is None and not piece.unknown and piece.parts == 1


def spread(update: Update, found: Found, known: Mapping[str, TensorInfo]) -> list[tuple[str, Update]]:
    """The update as one of each tensor that it is in, by the tensor's name; of an expert, ``found`` are its own.

    Raises UnsupportedError for a layout that is not rows of rows, FitError for an expert that the base does not have.
    """
    name = update.name
    expert = None
    if update.kind == "expert":
        name, expert = expert_of(update)
    made: list[tuple[str, Update]] = []
    at = 0
    for disk, piece in sorted(found, key=lambda item: item[1].part if item[1] is not None else 0):
        info = known[disk]
        if piece is not None and _as_it_may_be(piece):
            piece, square = None, len({*update.delta.shape}) == 1
            update = replace(update, told=update.told and not square)
        if piece is not None and (piece.unknown or piece.turned is None):
            raise UnsupportedError(
                f"{name} is made of {disk} in a way that dora-tools does not know "
                f"({piece.unknown or 'turned or not'}). Save the base as transformers 5 has it at run time "
                "(save_original_format=False)."
            )
        if piece is None and expert is None:
            made.append((disk, update))
        elif piece is None or piece.whole_on_disk:
            made.append((disk, _within(update, disk, info, piece, expert)))
        else:
            whole = shape_of(found, known) or ()
            part, at = _piece(update, disk, info, piece, whole[-2:], at)
            made.append((disk, part))
    return made


def _within(update: Update, disk: str, info: TensorInfo, piece: Piece | None, expert: int | None) -> Update:
    """An update of some rows of a tensor that holds more than its matrix."""
    number = expert if piece is None else piece.expert
    part, parts = (0, 1) if piece is None else (piece.part, piece.parts)
    stacked = number is not None
    rows = info.shape[-2] if stacked else info.rows
    if number is not None and (len(info.shape) != 3 or number >= info.shape[0]):
        raise FitError(
            f"{update.module} is expert {number} of {disk}, which has shape {list(info.shape)}. Is this the right base "
            "model?"
        )
    if piece is not None and ((piece.dim != stacked and parts > 1) or (piece.turned and parts > 1) or rows % parts):
        raise UnsupportedError(
            f"{update.module} is part {part + 1} of {parts} of {disk} along its columns, which dora-tools cannot "
            "merge. Merge into the base as it was saved by the version of transformers that trained the adapter."
        )
    first = (number or 0) * rows + part * (rows // parts)
    turned = piece is not None and bool(piece.turned)
    within = replace(update, part=(first, first + rows // parts))
    if update.kind == "expert":
        return within
    return replace(within, transposed=turned, told=True, kind="expert" if turned else update.kind)


def _piece(
    update: Update, disk: str, info: TensorInfo, piece: Piece, whole: tuple[int, ...], at: int
) -> tuple[Update, int]:
    """The rows of an update that are in one of the tensors which its matrix is made of; and where the next begin."""
    delta: Delta = update.delta
    out, in_ = delta.shape
    turned = bool(update.transposed) if (out, in_) == whole[::-1] == whole else (in_, out) == whole
    if not turned and (out, in_) != whole:
        raise FitError(
            f"{update.module}: the adapter updates a weight of {out} × {in_}, and the pieces of it in the base make "
            f"{' × '.join(map(str, whole))}. Is this the right base model?"
        )
    if out == in_ and not update.told and update.kind == "expert":
        return update, at  # whose orientation nobody knows: binding refuses it
    delta = delta.turned() if turned else delta
    magnitude = update.magnitude.turned() if update.magnitude and turned else update.magnitude
    size = info.shape[-1] if piece.turned else info.shape[-2]
    axis = piece.dim - (piece.expert is not None)
    if piece.parts > 1 and axis == 0:
        rows = slice(at, at + size)
        delta = delta.take(rows)
        if magnitude is not None and magnitude.axis == "out":
            magnitude = replace(magnitude, vector=magnitude.vector.rows(rows))
        elif magnitude is not None:
            raise UnsupportedError(f"{update.module}: a magnitude for each input of a weight that lies in pieces.")
        at += size
    elif piece.parts > 1:
        size = info.shape[-2] if piece.turned else info.shape[-1]
        if magnitude is not None:
            raise UnsupportedError(f"{update.module}: a DoRA of a weight that lies in pieces of its columns.")
        delta, at = delta.turned().take(slice(at, at + size)).turned(), at + size
    if piece.turned:
        delta = delta.turned()
        magnitude = magnitude.turned() if magnitude else None
    return replace(update, delta=delta, magnitude=magnitude, transposed=False, told=True, kind="expert"), at


def unstacked(adapter: Adapter) -> Adapter:
    """The same with a layer for each expert's matrix, gate and up apart: as files of transformers 4 name them.

    Raises UnsupportedError where it is not known which are a matrix' rows.
    """
    updates: list[Update] = []
    for update in adapter.updates:
        if update.kind != "expert":
            updates.append(update)
            continue
        if not update.told or update.transposed:
            raise UnsupportedError(
                f"{update.module}: how this model stores the weights of its experts is not known here. Merge into the "
                "Hugging Face model instead."
            )
        module, _, parameter = update.module.rpartition(".")
        delta, half = update.delta, update.delta.shape[0] // 2
        parts = {parameter: delta}
        if parameter == "gate_up_proj":
            parts = {"gate_proj": delta.take(slice(0, half)), "up_proj": delta.take(slice(half, 2 * half))}
        for name, part in parts.items():
            updates.append(replace(update, module=f"{module}.{name}", delta=part, kind="linear"))
    return replace(adapter, updates=tuple(updates))


def parted(
    name: str, replacement: Replacement, found: Found, known: Mapping[str, TensorInfo]
) -> list[tuple[str, Replacement]]:
    """A whole trained tensor as the tensors of the base that it is in. Raises UnsupportedError, FitError."""
    if len(found) == 1 and found[0][1] is None:
        return [(found[0][0], replacement)]
    shape, tensor = shape_of(found, known), replacement.tensor
    if shape is None:
        raise UnsupportedError(f"{name} is saved whole, and {found[0][0]} of the base is another arrangement of it.")
    if shape != tensor.shape:
        raise FitError(
            f"{tensor.key} has shape {list(tensor.shape)}, and what the base has of {name} makes {list(shape)}. Is "
            "this the right base model?"
        )
    made: list[tuple[str, Replacement]] = []
    ends: dict[int | None, int] = {}
    for disk, piece in sorted(found, key=lambda item: (item[1].expert or 0, item[1].part) if item[1] else (0, 0)):
        assert piece is not None
        one = tensor
        if piece.expert is not None:
            one = one.rows(slice(piece.expert, piece.expert + 1)).reshape(*shape[1:])
        axis, info = piece.dim - (piece.expert is not None), known[disk]
        size = info.shape[::-1][axis] if piece.turned else info.shape[axis]
        first = ends.get(piece.expert, 0)
        ends[piece.expert] = first + size
        if piece.parts > 1:
            rows = slice(first, first + size)
            one = one.rows(rows) if axis == 0 else one.T.rows(rows).T
        made.append((disk, replace(replacement, tensor=one.T if piece.turned else one)))
    return made
