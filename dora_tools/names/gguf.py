"""HF names and row orders ⇄ those of GGUF files, for the architectures whose layout is known.

llama.cpp's converter renames, stacks experts, fuses some projections and, for the Llama family, reorders the rows of q
and k within each head. All of these are row operations, so they apply to lora_B, to a magnitude and to a bias as they
do to the weight, and leave lora_A alone: an adapter can be *translated*, and then fits a GGUF base like any other.
``gguf.json`` is proved against the converter by fixtures/make_gguf_names.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from ..adapter import Adapter, LowRank, Replacement, Update
from ..checkpoint import Checkpoint, Ref, TensorInfo
from ..deltas import Sized, Tokens
from ..errors import FitError, InputError, TargetError, UnsupportedError

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,5})(?![^.])")
# what may stand before the names of the table: (dropped, put in its place)
_PREFIXES = (
    ("", ""),
    ("", "model."),
    ("", "transformer."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
    ("language_model.", "model."),
    ("bert.", ""),
    ("roberta.", ""),
)
_FUSED = {
    "attn_qkv": {"attn_q": "q", "attn_k": "k", "attn_v": "v"},
    "ffn_gate_up_exps": {"ffn_gate_exps": "gate", "ffn_up_exps": "up"},
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_EMBEDDINGS = frozenset(["token_embd", "position_embd", "token_types"])


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files(__package__) / "gguf.json").read_text())
    return table


def architectures() -> list[str]:
    """The GGUF architectures whose layout is known."""
    return sorted(_table()["architectures"])


def row_order(rows: int, heads: int) -> list[int]:
    """π of llama.cpp's converter: row i of the GGUF tensor is row π(i) of the HF one; halves of a head interleave.

    Raises FitError where the rows are not so many heads of an even size.
    """
    if heads < 1 or rows % (2 * heads):
        raise FitError(f"{rows} rows are not {heads} heads of an even size: is it the right base model?")
    size = rows // heads
    return [head * size + half * (size // 2) + pair
            for head in range(heads) for pair in range(size // 2) for half in range(2)]  # fmt: skip


def inverse(order: Sequence[int]) -> list[int]:
    """The order that undoes ``order``."""
    back = [0] * len(order)
    for new, old in enumerate(order):
        back[old] = new
    return back


@dataclass(frozen=True, slots=True)
class Place:
    """Where an HF module lies: a GGUF name without ``.weight``, and which of the matrices in it (an expert, a slice).

    ``heads``: its rows are interleaved within so many heads. ``slice``: q, k or v of a fused projection, gate or up of
    a fused pair.
    """

    name: str
    block: int | None = None
    expert: int | None = None
    heads: int = 0
    slice: str = ""


@dataclass(frozen=True)
class Dialect:
    """The names and row orders of one model in GGUF.

    ``heads`` and ``heads_kv`` are of each block, or of all (one number); empty where nobody said. ``known`` are the
    tensors of the GGUF base, if there is one: it tells what is fused.
    """

    architecture: str
    heads: tuple[int, ...] = ()
    heads_kv: tuple[int, ...] = ()
    known: Mapping[str, TensorInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in _table()["architectures"]:
            raise UnsupportedError(
                f"The layout of GGUF files of architecture '{self.architecture}' is not known here, so nothing is "
                f"merged into them or made for them. Known: {', '.join(architectures())}. For others: merge into the "
                "Hugging Face model, and convert the result with llama.cpp's convert_hf_to_gguf.py."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """The row of the architecture in ``gguf.json``."""
        facts: dict[str, Any] = _table()["architectures"][self.architecture]
        return facts

    @property
    def spellings(self) -> dict[str, list[str]]:
        """GGUF name with {} for numbers → its HF names, the usual one first."""
        spellings: dict[str, list[str]] = _table()["names"][self.facts["names"]]
        return spellings

    @cached_property
    def _hf(self) -> dict[str, str]:
        return {name: ours for ours, names in self.spellings.items() for name in names}

    @property
    def permutes(self) -> bool:
        return bool(self.facts.get("permute"))

    def shift(self, module: str) -> float:
        """What llama.cpp's converter adds to the weight of a norm."""
        shifted = module.rpartition(".")[2] in self.facts.get("shifted", ())
        return float(self.facts.get("norm_shift", 0)) if shifted else 0.0

    def may_untie(self) -> bool:
        """Whether llama.cpp reads an ``output.weight`` of a model whose head is tied to its embedding."""
        return bool(self.facts.get("separate_output"))

    # HF → GGUF

    def place(self, module: str) -> Place | None:
        """Where an HF module lies; None where the architecture has no such module."""
        for drop, add in _PREFIXES:
            if not module.startswith(drop) or (drop.endswith("bert.") and "bert" not in self.architecture):
                continue
            path = add + module.removeprefix(drop)
            found = self._hf.get(_NUMBER.sub("{}", path))
            if found is not None:
                return self._placed(found, [int(number) for number in _NUMBER.findall(path)])
        return None

    def _placed(self, template: str, numbers: list[int]) -> Place:
        block = numbers[0] if numbers else None
        name = template.format(*numbers) if numbers else template
        place = Place(name, block, numbers[1] if len(numbers) > 1 else None, self._heads(template, block))
        if f"{name}.weight" in self.known or block is None:
            return place
        stem, _, leaf = name.rpartition(".")
        for fused, slices in _FUSED.items():
            if leaf in slices and f"{stem}.{fused}.weight" in self.known:
                return replace(place, name=f"{stem}.{fused}", slice=slices[leaf])
        return place

    def heads_of(self, name: str) -> int:
        """Within how many heads the rows of a GGUF module are interleaved; 0: they are as in the HF model."""
        number = next(iter(_NUMBER.findall(name)), None)
        return self._heads(name, int(number) if number else None)

    def _heads(self, template: str, block: int | None) -> int:
        leaf = template.rpartition(".")[2]
        if not self.permutes or leaf not in ("attn_q", "attn_k"):
            return 0
        return self._count(self.heads if leaf == "attn_q" else self.heads_kv, block)

    def _count(self, heads: tuple[int, ...], block: int | None) -> int:
        if len(heads) > 1 and (block is None or block >= len(heads)):
            raise FitError(f"The GGUF model has {len(heads)} blocks, and the adapter is of a block {block}.")
        if heads and heads[0 if len(heads) == 1 else block or 0] < 1:
            raise FitError(f"The metadata of the GGUF model says that block {block} has no attention heads.")
        if not heads and self.known:
            raise FitError(
                f"The GGUF base does not say how many heads it has ({self.architecture}.attention.head_count)."
            )
        if not heads:
            raise InputError(
                f"The rows of q and k are in another order in GGUF files of '{self.architecture}', and how many heads "
                "the model has is not known: say --base, the model that it is of (its config.json or its GGUF)."
            )
        return heads[0] if len(heads) == 1 else heads[block or 0]

    def part(self, place: Place, rows: int) -> tuple[int, int] | None:
        """Which rows of the stored tensor an HF matrix of so many ``rows`` takes up; None: all of them.

        Raises FitError where the base's are not so many.
        """
        info = self.known.get(f"{place.name}.weight")
        if place.slice in ("q", "k", "v") and info is not None:
            start, end = self.slices(place.name, place.block)[place.slice]
            if rows != end - start:
                raise FitError(
                    f"{place.name}: the adapter's {place.slice} has {rows} rows, and that of the base {end - start}. "
                    "Is this the right base model?"
                )
            return start, end
        if place.expert is None:
            return None
        if info is not None and place.expert >= info.shape[0]:
            raise FitError(
                f"{place.name} of the base has {info.shape[0]} experts, and the adapter is of a number {place.expert}."
            )
        step = (2 if place.slice else 1) * rows
        if info is not None and step != info.shape[-2]:
            raise FitError(
                f"{place.name}: an expert of the base has {info.shape[-2]} rows, and the adapter's makes {step}. Is "
                "this the right base model?"
            )
        start = place.expert * step + (rows if place.slice == "up" else 0)
        return start, start + rows

    def slices(self, name: str, block: int | None) -> dict[str, tuple[int, int]]:
        """The rows of q, k and v in a fused projection of the base. Raises FitError where they cannot be told."""
        rows = self.known[f"{name}.weight"].rows
        q, kv = self._count(self.heads, block), self._count(self.heads_kv, block)
        if rows % (q + 2 * kv):
            raise FitError(f"{name} of the base has {rows} rows, which are not {q} heads and twice {kv}.")
        size = rows // (q + 2 * kv)
        return {"q": (0, q * size), "k": (q * size, (q + kv) * size), "v": ((q + kv) * size, rows)}

    def adapter(self, adapter: Adapter) -> Adapter:
        """An adapter with HF names as one of the GGUF: names, row orders, and parts of stacked or fused tensors.

        Raises FitError for what has no place in it, and UnsupportedError for what cannot be placed in part.
        """
        places = {update.module: self.place(update.module) for update in adapter.updates}
        owners = {name: self.place(name.rpartition(".")[0]) for name in adapter.replaced}
        lost = [name for name, place in {**places, **owners}.items() if place is None]
        if lost:
            raise FitError(
                f"{len(lost)} of the adapter's {len(places) + len(owners)} modules and tensors have no place in a GGUF "
                f"of architecture '{self.architecture}': {', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}. Is it "
                "the right base? If it is, merge into the Hugging Face model and convert that with "
                "convert_hf_to_gguf.py."
            )
        _refuse_twice({**places, **{name: p for name, p in owners.items() if name.endswith(".weight")}})
        scaled = [p.name for p in (*places.values(), *owners.values()) if p and f"{p.name}.scale" in self.known]
        if scaled:
            raise UnsupportedError(
                f"{scaled[0]}.weight is stored with a scale of its own ({scaled[0]}.scale, as NVFP4 has it), which a "
                "merged weight could not keep. Merge into another GGUF of the model, or into its Hugging Face weights."
            )
        updates = tuple(self._update(u, place) for u in adapter.updates if (place := places[u.module]))
        replaced: dict[str, Replacement] = {}
        for name, place in owners.items():
            assert place is not None  # or it would be among the lost
            full, replacement = self._replacement(name, adapter.replaced[name], place)
            if full in replaced:
                raise FitError(f"{name} and {replaced[full].tensor.key} of the adapter are both {full} in the GGUF.")
            replaced[full] = replacement
        return replace(adapter, updates=updates, replaced=replaced)

    def _update(self, update: Update, place: Place) -> Update:
        out = update.delta.shape[0]
        if out < 0 and update.magnitude is not None and update.magnitude.axis == "out":
            out = update.magnitude.vector.shape[0]
        if update.kind == "conv" or update.part is not None or update.parameter not in ("weight", "bias"):
            raise UnsupportedError(f"{update.module} is no linear layer, embedding or expert of a GGUF model.")
        embedding = place.name in _EMBEDDINGS
        if update.kind == "embedding" and not embedding:
            raise FitError(
                f"{update.module} has the factors of an embedding, and is {place.name} in the GGUF, a layer."
            )
        known = self.known.get(f"{place.name}.weight")
        if embedding and known is not None and max(update.delta.shape) > max(known.shape):
            raise FitError(
                f"{update.module} is of {max(update.delta.shape)} tokens, and the GGUF has {max(known.shape)}: "
                "llama.cpp's converter may have cut off what the tokenizer does not use. Merge into the Hugging Face "
                "model and convert that with convert_hf_to_gguf.py."
            )
        update = replace(update, module=place.name, transposed=False, told=True)
        if update.kind == "embedding" or isinstance(update.delta, Tokens):
            return update
        parted = place.expert is not None or bool(place.slice)
        if out < 0 and isinstance(update.delta, Sized) and known is not None and not parted:
            out = known.shape[0]  # its rows differ, only their number is not known
        if out < 0:  # it is the same for all rows
            if parted:
                raise UnsupportedError(
                    f"{update.module} is one part of {place.name} in the GGUF, and what its adapter does to a part is "
                    "not known here. Merge into the Hugging Face model instead."
                )
            return update
        part = self.part(place, out)
        if not part and known is not None and len(known.shape) == 2 and out != known.shape[0] and place.heads:
            raise FitError(
                f"{place.name}: the adapter's has {out} rows, and the base's {known.shape[0]}. Is this the right base "
                "model?"
            )
        moved = _reordered(update, row_order(out, place.heads)) if place.heads else update
        return replace(moved, part=part)

    def _replacement(self, name: str, replacement: Replacement, place: Place) -> tuple[str, Replacement]:
        tensor, parameter = replacement.tensor, name.rpartition(".")[2]
        leaf = place.name.rpartition(".")[2]
        if place.expert is not None or place.slice:
            raise UnsupportedError(
                f"{name} is saved whole, and in the GGUF base it is one part of {place.name}. Merge into the Hugging "
                "Face model instead."
            )
        if place.heads:
            tensor = tensor.rows(row_order(tensor.shape[0], place.heads))
        if parameter == "weight" and leaf in self.facts.get("transposed", ()):
            tensor = tensor.T
        shift = self.shift(place.name)
        if shift and parameter == "weight":
            tensor = _shifted(tensor, shift)
        full = f"{place.name}.{parameter}"
        base = self.known.get(full, self.known.get(EMBEDDING) if full == HEAD else None)
        if base is not None and base.shape != tensor.shape:
            grown = (
                " Of a vocabulary that grew, the new tokens would have to be in the GGUF too: merge into the Hugging "
                "Face model and convert that with convert_hf_to_gguf.py."
            )
            raise FitError(
                f"{name} has shape {list(replacement.tensor.shape)} and the GGUF's {full} {list(base.shape)}. Is this "
                f"the right base model?{grown if full in (EMBEDDING, HEAD) else ''}"
            )
        return full, replace(replacement, tensor=tensor)

    # GGUF → HF

    def names(self, name: str) -> Iterator[str]:
        """All HF names of a GGUF module; the experts of a stacked one have {} for their number."""
        numbers = _NUMBER.findall(name)
        template = _NUMBER.sub("{}", name)
        for spelling in self.spellings.get(template, ()) if template.count("{}") == len(numbers) else ():
            yield spelling.format(*numbers, *["{}"] * (spelling.count("{}") - len(numbers)))

    def back(self, adapter: Adapter, known: Mapping[str, TensorInfo] | None = None, reorder: bool = True) -> Adapter:
        """An adapter with GGUF names as one of the HF model; of several names one in ``known``, else the usual one.

        Without ``reorder`` the rows stay as they are. Raises FitError for names that the architecture does not have,
        and InputError where it is not known how many heads there are.
        """
        apart = [piece for update in adapter.updates for piece in self._apart(update)]
        return replace(adapter, updates=tuple(self._update_back(u, known or {}, reorder) for u in apart))

    def _apart(self, update: Update) -> Iterator[Update]:
        """The updates of the matrices that the base has fused, which share their lora_A; else the update itself."""
        stem, _, leaf = update.module.rpartition(".")
        fused, delta = _FUSED.get(leaf, {}), update.delta
        if any(self.names(update.module)) or not fused or not isinstance(delta, LowRank):
            yield update
            return
        if f"{update.module}.weight" not in self.known:
            raise FitError(f"{update.module} is a fused tensor: say --base, the GGUF that has it.")
        rows = delta.shape[0]
        block = next(iter(_NUMBER.findall(update.module)), None)
        where = (
            self.slices(update.module, int(block) if block else None)
            if leaf == "attn_qkv"
            else {"gate": (0, rows // 2), "up": (rows // 2, rows)}
        )
        for name, piece in fused.items():
            first, last = where[piece]
            expert = update.part[0] // rows if update.part else None
            height = last - first
            yield replace(
                update,
                module=f"{stem}.{name}",
                delta=replace(delta, lora_B=delta.lora_B.rows(slice(first, last))),
                part=(expert * height, (expert + 1) * height) if expert is not None else None,
            )

    def _update_back(self, update: Update, known: Mapping[str, TensorInfo], reorder: bool) -> Update:
        names = list(self.names(update.module))
        if not names or any("{}" in name for name in names) != (update.part is not None):
            raise FitError(
                f"{update.module} is no tensor of a GGUF model of architecture '{self.architecture}', or one of other "
                "dimensions."
            )
        out = update.delta.shape[0]
        expert = update.part[0] // out if update.part else None
        spelled = [name.format(expert) for name in names]
        module = next((n for n in spelled if f"{n}.weight" in known or f"model.{n}.weight" in known), spelled[0])
        heads = self.heads_of(update.module) if reorder else 0
        leaf = update.module.rpartition(".")[2]
        update = replace(update, part=None, told=False, transposed=leaf in self.facts.get("transposed", ()))
        moved = _reordered(update, inverse(row_order(out, heads))) if heads else update
        return replace(moved, module=module)


def _refuse_twice(places: Mapping[str, Place | None]) -> None:
    """Two names for one place would be one too many. Raises FitError."""
    seen: dict[tuple[str, int | None, str], str] = {}
    for name, place in places.items():
        if place is None:
            continue
        module, at = name.removesuffix(".weight"), (place.name, place.expert, place.slice)
        if seen.setdefault(at, module) != module:
            raise FitError(f"{seen[at]} and {module} of the adapter are both {place.name} in the GGUF.")


def _reordered(update: Update, order: Sequence[int]) -> Update:
    """The update of the same matrix with its rows in another order."""
    delta = update.delta.take(order)
    magnitude = update.magnitude
    if magnitude is not None and magnitude.axis == "out":
        magnitude = replace(magnitude, vector=magnitude.vector.rows(order))
    bias = update.bias.rows(order) if update.bias is not None else None
    return replace(update, delta=delta, magnitude=magnitude, bias=bias)


def _shifted(tensor: Ref, shift: float) -> Ref:
    return replace(tensor, fetch=lambda: tensor.load() + shift, scale=1.0, origin=None)


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The small values of a GGUF's metadata, which of a split are in its first file; none for another checkpoint."""
    headers = checkpoint.metadata.get("gguf") or {}
    found: Mapping[str, Any] = next((header.values for header in headers.values()), {})
    return found


def of_gguf(checkpoint: Checkpoint) -> Dialect:
    """The dialect of a GGUF base. Raises UnsupportedError for an architecture whose layout is not known."""
    values = settings(checkpoint)
    architecture = str(values.get("general.architecture"))
    heads = _numbers(values.get(f"{architecture}.attention.head_count"))
    heads_kv = _numbers(values.get(f"{architecture}.attention.head_count_kv")) or heads
    return Dialect(architecture, heads, heads_kv, checkpoint.tensors)


def of_config(config: Mapping[str, Any], architecture: str | None = None) -> Dialect:
    """The dialect that llama.cpp's converter gives a Hugging Face model. Raises TargetError if it is not known."""
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else {}
    types = [c.get("model_type") for c in (config, inner)]  # of a multimodal model the whole's type is the closer one
    config = {**config, **inner}
    rows = _table()["architectures"].items()
    found = next((name for kind in types for name, row in rows if kind in row["model_types"]), None)
    if architecture is not None and found not in (architecture, None):
        raise TargetError(f"--arch says {architecture}, and the base is of '{found}'.")
    architecture = architecture or found
    if architecture is None:
        raise TargetError(
            f"Of models of type '{types[0]}' the GGUF layout is not known here. Known GGUF architectures: "
            f"{', '.join(architectures())}. For others: merge into the model and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    heads = _numbers(config.get("num_attention_heads", config.get("n_head")))
    return Dialect(architecture, heads, _numbers(config.get("num_key_value_heads")) or heads)


def _numbers(value: Any) -> tuple[int, ...]:
    many = value if isinstance(value, list | tuple) else (value,)
    return tuple(n for n in many if isinstance(n, int) and not isinstance(n, bool))
