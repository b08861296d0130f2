"""A Hugging Face model in the shape of a GGUF file, and a GGUF model in the shape of a Hugging Face one.

The first is a template's metadata, vocabulary and vectors, with matrices of the model's own.

With it a GGUF in full precision needs no converter of our own: whatever is hard to get right (tokenizer, hyper-
parameters, special tensors) is copied from a file that llama.cpp's converter made of the same model, maybe a quantised
one, and every matrix is compared with the template's before it takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .binding import refuse_quantised
from .checkpoint import Checkpoint, Span, TensorInfo, blocks, same, single_threaded
from .dtypes import DTYPES
from .errors import FitError, UnsupportedError, UsageError
from .names.gguf import EMBEDDING, HEAD, Place, inverse, of_gguf, row_order

if TYPE_CHECKING:
    import torch

_SAMPLE = 1 << 17  # elements of each matrix that are compared with the template's
_SIZES, _VECTORS = 1.25, 0.01  # how much larger a matrix may be, and how far apart vectors
_ALIKE, _DOUBTFUL = 0.8, 0.9  # 4-bit types give 0.995, 2-bit ones about 0.95; another row order 0.05
# parts of a multimodal model that llama.cpp keeps in a file of their own (mmproj)
_ELSEWHERE = ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "audio_tower.", "embed_audio.")
_UNUSED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that older models saved


@dataclass(frozen=True, slots=True)
class _Piece:
    """``rows`` of a matrix from ``first`` on, which are those of a stored one from ``at`` on, or in another order.

    ``turned``: they are its columns.
    """

    name: str
    first: int
    rows: int
    order: tuple[int, ...] = ()
    turned: bool = False
    at: int = 0

    def read(self, source: Checkpoint, first: int, last: int, out: torch.Tensor) -> None:
        """The rows [first, last) of the piece into ``out``."""
        if self.turned:
            out.copy_(source.read(self.name).T[first:last])
        elif self.order:
            wanted = self.order[first:last]
            low = min(wanted)
            near = source.read(self.name, self.at + low, self.at + max(wanted) + 1)
            out.copy_(near[[row - low for row in wanted]])
        else:
            source.read(self.name, self.at + first, self.at + last, out)


def _read(
    pieces: Sequence[_Piece],
    source: Checkpoint,
    info: TensorInfo,
    start: int,
    stop: int | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Rows [start, stop) of a matrix that is put together of ``pieces``."""
    import torch

    stop = info.rows if stop is None else stop
    rows = torch.empty(stop - start, info.width) if out is None else out
    for piece in pieces:
        first, last = max(start, piece.first), min(stop, piece.first + piece.rows)
        if first < last:
            piece.read(source, first - piece.first, last - piece.first, rows[first - start : last - start])
    return rows


class Templated:
    """The checkpoint: names, order and metadata of the template; see the module. ``notes`` are for the user.

    Raises FitError and UnsupportedError where the two are not of one model.
    """

    def __init__(self, template: Checkpoint, base: Checkpoint) -> None:
        if "gguf" not in template.metadata or "gguf" in base.metadata:
            raise UsageError("--like takes a GGUF file, and --base then the Hugging Face model that it was made of.")
        refuse_quantised(base.metadata.get("config") or {})
        self._template, self._base = template, base
        self._dialect = of_gguf(template)
        self.notes: list[str] = []
        self._vectors: dict[str, tuple[str, Place]] = {}
        self._pieces = dict(self._placed())
        self.metadata: Mapping[str, Any] = template.metadata
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in template.tensors.items():
            for piece in self._pieces.get(name, ()):
                dtype = base.tensors[piece.name].dtype
                if not DTYPES[dtype].floating or DTYPES[dtype].quantised:
                    raise UnsupportedError(f"{piece.name} is stored as {dtype}; give the base in BF16, F16 or F32.")
                if info.dtype != "F32":  # llama.cpp cannot run F64
                    info = replace(info, dtype="F32" if dtype == "F64" else dtype, width=0)
            self.tensors[name] = info

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """See Checkpoint."""
        pieces = self._pieces.get(name)
        if pieces is None:
            return self._template.read(name, start, stop, out)
        return _read(pieces, self._base, self.tensors[name], start, stop, out)

    def span(self, name: str) -> Span | None:
        pieces = self._pieces.get(name)
        if pieces is None:
            return self._template.span(name)
        piece, info = pieces[0], self.tensors[name]
        whole = len(pieces) == 1 and not piece.order and not piece.turned
        same_type = whole and self._base.tensors[piece.name].dtype == info.dtype
        span = self._base.span(piece.name) if same_type else None
        return replace(span, length=info.nbytes) if span is not None else None

    def _placed(self) -> Iterator[tuple[str, list[_Piece]]]:
        """Which HF tensors make up each matrix. Raises FitError for any that is missing, left over or of other size."""
        dialect, found = self._dialect, dict[str, dict[tuple[int, str], tuple[str, Place]]]()
        lost, elsewhere = [], 0
        for name, info in self._base.tensors.items():
            module, _, parameter = name.rpartition(".")
            place = dialect.place(module)
            if place is None and any(part in f".{name}" for part in (f".{p}" for p in _ELSEWHERE)):
                elsewhere += 1
            elif place is None:
                lost += [name] if not name.endswith(_UNUSED) else []
            elif parameter == "weight" and len(info.shape) > 2:
                raise FitError(f"{name} of the base has shape {list(info.shape)}, and is no matrix as in its GGUF.")
            elif parameter == "weight" and len(info.shape) == 2:
                key = (place.expert or 0, place.slice)
                target = f"{place.name}.weight"
                if key in found.setdefault(target, {}):
                    raise FitError(f"{name} and {found[target][key][0]} of the base are both {target} in the GGUF.")
                found[target][key] = (name, place)
            elif place.slice:
                continue
            elif f"{place.name}.{parameter}" not in self._template.tensors:
                lost.append(name)
            else:
                self._vectors[f"{place.name}.{parameter}"] = name, place
        self._check_ties(found)
        lost += [sources[key][0] for name, sources in found.items() for key in sources
                 if name not in self._template.tensors]  # fmt: skip
        if lost:
            raise FitError(
                f"{len(lost)} tensors of the base have no place in the template: {', '.join(lost[:3])}"
                f"{', …' if len(lost) > 3 else ''}. Is it a GGUF of the same model?"
            )
        if elsewhere:
            self.notes.append(f"{elsewhere} tensors of the base's vision or audio part are in llama.cpp's mmproj file.")
        for name, info in self._template.tensors.items():
            if name in found and f"{name.removesuffix('weight')}scale" in self._template.tensors:
                raise UnsupportedError(
                    f"{name} of the template is stored with a scale of its own, as NVFP4 has it. Take another template."
                )
            if name in found:
                yield name, list(self._pieces_of(name, info, list(found[name].values())))
            elif len(info.shape) > 1 or (name not in self._vectors and any(dialect.names(name.rpartition(".")[0]))):
                raise FitError(
                    f"{name} of the template, of shape {list(info.shape)}, is nothing in the base. Is it a GGUF of the "
                    "same model?"
                )

    def _check_ties(self, found: dict[str, dict[tuple[int, str], tuple[str, Place]]]) -> None:
        embedding, head = found.get(EMBEDDING), found.get(HEAD)
        if HEAD in self._template.tensors and head is None and embedding is not None:
            found[HEAD] = dict(embedding)
        elif HEAD not in self._template.tensors and head is not None and embedding is not None:
            (one, _), (other, _) = (next(iter(sources.values())) for sources in (embedding, head))
            if not same(self._base, one, self._base, other):
                raise FitError(
                    f"The base has a head of its own ({other}), and the template's is its embedding. Is it a GGUF of "
                    "the same model?"
                )
            del found[HEAD]

    def _pieces_of(self, name: str, info: TensorInfo, sources: list[tuple[str, Place]]) -> Iterator[_Piece]:
        filled, leaf = 0, name.removesuffix(".weight").rpartition(".")[2]
        turned = leaf in self._dialect.facts.get("transposed", ())
        for source, place in sources:
            shape = self._base.tensors[source].shape
            rows, width = (shape[0], prod(shape[1:]))[:: -1 if turned else 1]
            if name in (EMBEDDING, HEAD) and rows > info.rows:
                self.notes.append(f"{name}: the template has {info.rows} of the base's {rows} rows, as converted.")
                rows = info.rows
            part = self._dialect.part(place, rows)
            if width != info.width or (part and part[1] > info.rows):
                raise FitError(
                    f"{source} has shape {list(shape)}, and {name} of the template {list(info.shape)}. Is it a GGUF of "
                    "the same model?"
                )
            order = tuple(row_order(rows, place.heads)) if place.heads else ()
            yield _Piece(source, part[0] if part else 0, rows, order, turned)
            filled += rows
        if filled != info.rows:
            raise FitError(
                f"{name} of the template has {info.rows} rows, of which the base's {sources[0][0]} … give {filled}. Is "
                "it a GGUF of the same model?"
            )

    def check(self, threads: int) -> None:
        """Compare a sample of every matrix with the template's. Raises FitError where they are not one model's.

        Of a matrix whose rows are in another order, the HF order must fit worse. Vectors, which are the template's,
        must be the base's.
        """
        self._check_vectors()
        worst, least = "", 2.0
        for name, (cosine, other, size) in blocks(list(self._pieces), self._cosines, threads):
            if not 1 / _SIZES < size < _SIZES:
                raise FitError(
                    f"{name} of the template is not the base's: theirs is {1 / size:.2f} times as large. Is it a GGUF "
                    "of the same model?"
                )
            if other > cosine + 0.1:
                raise FitError(
                    f"{name}: the template has its rows in the order of the Hugging Face model (cosine {other:.3f}, "
                    f"in llama.cpp's order {cosine:.3f}), which llama.cpp's converter does not write. Take another "
                    "template."
                )
            if cosine < _ALIKE:
                raise FitError(
                    f"{name} of the template is not the base's (cosine {cosine:.3f} where at least {_ALIKE} is "
                    "expected, even of 2 bits). Is it a GGUF of the same model?"
                )
            worst, least = (name, cosine) if cosine < least else (worst, least)
        if least < _DOUBTFUL:
            self.notes.append(f"The template's {worst} is only roughly the base's (cosine {least:.3f}).")

    def _check_vectors(self) -> None:
        for name, (source, place) in self._vectors.items():
            info = self._base.tensors[source]
            if not DTYPES[info.dtype].floating or info.shape != self._template.tensors[name].shape:
                raise FitError(f"{source} of the base is not {name} of the template: another type or shape.")
            ours, theirs = self._base.read(source).flatten().double(), self._template.read(name).flatten().double()
            if place.heads:
                ours = ours[row_order(len(ours), place.heads)]
            ours = ours + (self._dialect.shift(place.name) if name.endswith(".weight") else 0)
            if float((ours - theirs).norm()) > _VECTORS * float(theirs.norm()) + 1e-6:
                raise FitError(
                    f"{name} of the template is not {source} of the base, and vectors are taken from the template. "
                    "Take a GGUF that was made of this very base (convert_hf_to_gguf.py makes one)."
                )

    def _cosines(self, name: str) -> tuple[float, float, float]:
        """Of a sample: cos(HF rows in GGUF's order, template's rows); in HF's order, if another; ‖HF‖ / ‖template‖."""
        single_threaded()
        import torch

        info = self._template.tensors[name]
        if not DTYPES[info.dtype].floating:
            raise UnsupportedError(f"{name} of the template is stored as {info.dtype}, which cannot be decoded.")
        count = max(1, min(info.rows, _SAMPLE // info.width))
        first = (info.rows - count) // 2
        theirs = self._template.read(name, first, first + count)

        def cosine(values: torch.Tensor) -> float:
            return float(torch.nn.functional.cosine_similarity(values.flatten(), theirs.flatten(), dim=0))

        pieces, ours = self._pieces[name], self.read(name, first, first + count)
        size = float(ours.norm()) / max(float(theirs.norm()), 1e-30)
        if not any(piece.order for piece in pieces):
            return cosine(ours), -1.0, size
        unordered = [replace(piece, order=()) for piece in pieces]
        plain = _read(unordered, self._base, self.tensors[name], first, first + count, None)
        return cosine(ours), cosine(plain), size


class Unpacked:
    """The other way round: a GGUF model under HF names, with HF's order of rows, dequantised."""

    def __init__(self, model: Checkpoint) -> None:
        self._model, self._dialect = model, of_gguf(model)
        dialect = self._dialect
        self.metadata: Mapping[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._pieces: dict[str, _Piece] = {}
        self._vectors: dict[str, str] = {}
        for name, info in model.tensors.items():
            module, _, parameter = name.rpartition(".")
            spelling = next(dialect.names(module), None)
            if spelling is None and len(info.shape) > 1:
                raise UnsupportedError(
                    f"{name} has no name of its own in the Hugging Face model (is it fused?), so this command cannot "
                    "use this GGUF. Give the Hugging Face model, or merge."
                )
            if spelling is None or len(info.shape) < 2:
                self.tensors[f"{spelling}.{parameter}" if spelling else name] = info
                self._vectors[f"{spelling}.{parameter}" if spelling else name] = name
                continue
            turned = module.rpartition(".")[2] in dialect.facts.get("transposed", ())
            rows = info.shape[-2]
            heads = dialect.heads_of(module)
            order = tuple(inverse(row_order(rows, heads))) if heads else ()
            for number in range(info.rows // rows):
                hf = f"{spelling.format(number)}.weight"
                shape = info.shape[-2:][:: -1 if turned else 1]
                self.tensors[hf] = TensorInfo("F32" if turned else info.dtype, shape)
                self._pieces[hf] = _Piece(name, 0, shape[0], order, turned, number * rows)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """See Checkpoint."""
        if name in self._vectors:
            return self._vector(name, start, stop, out)
        return _read([self._pieces[name]], self._model, self.tensors[name], start, stop, out)

    def _vector(self, name: str, start: int, stop: int | None, out: torch.Tensor | None) -> torch.Tensor:
        stored = self._vectors[name]
        module, _, parameter = stored.rpartition(".")
        values = self._model.read(stored)
        heads = self._dialect.heads_of(module)
        if heads:
            values = values[inverse(row_order(len(values), heads))]
        values = (values - (self._dialect.shift(module) if parameter == "weight" else 0))[start:stop]
        return values if out is None else out.copy_(values)

    def span(self, name: str) -> Span | None:
        return None
