"""How the tensors of a merged GGUF are stored, and what that does to the adapter.

Rounding a merged weight back to the 4-bit lattice of its base undoes most of a fine-tune: steps smaller than half the
lattice's are rounded away. So what is merged into a quantised base becomes Q8_0 unless something else is asked for,
the loss is measured while the file is written, and a file that the adapter is not in is not kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .binding import Binding
from .dtypes import DTYPES, GGUF_WRITES, LIBGGUF_WRITES
from .errors import TargetError, UsageError
from .names.gguf import EMBEDDING, of_gguf, settings
from .recipes import FILE_TYPES, Model, named, types_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .compare import Rounding


@dataclass
class Storing:
    """The types of a merged GGUF: those that change, the file's own name for them, and how what is lost is judged."""

    binding: Binding = field(repr=False)
    choice: str = "auto"
    allow_loss: bool = False
    dtypes: dict[str, str] = field(init=False)
    correlations: dict[str, float] = field(init=False, default_factory=dict)
    rounding: Rounding | None = field(init=False, default=None)
    examined: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.choice = named(self.choice)
        if not self.choice:
            raise UsageError("--gguf-type is empty: is a shell variable not set?")
        tensors = self.binding.base.tensors
        touched = {*self.binding.bound, *self.binding.saved}
        if self.choice == "auto":
            kinds = {n: self._was(n) if n in self.binding.added else tensors[n].dtype for n in touched}
            found = {n: _roomy(kind, tensors[n].width) for n, kind in kinds.items()}
        elif self.choice == "keep":
            found = {n: self._was(n) for n in tensors}
            touched |= {n for n, kind in found.items() if kind != tensors[n].dtype}
            lost = [n for n in touched if DTYPES[found[n]].quantised and found[n] not in _WRITTEN]
            if lost:
                raise TargetError(
                    f"{lost[0]} is stored as {found[lost[0]]}, which nothing here can write. Leave --gguf-type keep "
                    "out, and it becomes Q8_0."
                )
        else:
            stored = {name: (info.dtype, info.shape) for name, info in tensors.items()}
            found = types_of(self.choice, stored, _model(self.binding.base))
        self.dtypes = {name: kind for name, kind in found.items() if kind != tensors[name].dtype}

    def _was(self, name: str) -> str:
        """What a tensor is stored as in the GGUF that gives the shape: the base, or the template.

        A head that was the embedding is stored as that.
        """
        info = self.binding.base.tensors[name]
        headers = self.binding.base.metadata["gguf"].values()
        stored = EMBEDDING if name in self.binding.added else name
        kind: str = next((header.types[stored] for header in headers if stored in header.types), info.dtype)
        return kind

    @property
    def file_type(self) -> int | None:
        """general.file_type, where it was chosen."""
        return FILE_TYPES.get(self.choice)

    @property
    def notes(self) -> list[str]:
        """What is to be known of the choice before anything is done."""
        before = self.binding.base.tensors
        again = [n for n in self.dtypes if DTYPES[before[n].dtype].quantised and DTYPES[self.dtypes[n]].quantised]
        if self.choice in ("auto", "keep") or not again:
            return []
        pairs = sorted({f"{before[n].dtype} to {self.dtypes[n]}" for n in again})
        return [
            f"{len(again)} tensors are quantised a second time ({', '.join(pairs)}): merging from the full-precision "
            "model (--base HF_DIR --like this GGUF) loses less."
        ]

    def examine(self, threads: int) -> list[str]:
        """Look whether a DoRA's magnitudes are of this base. Raises FitError where its rows are in another order."""
        from .evidence import judged, signs

        self.examined = True
        found = signs(self.binding, of_gguf(self.binding.base), threads)
        self.correlations = {sign.module: sign.correlation for sign in found}
        return judged(found)

    def measure(self) -> Rounding:
        """What sees every tile that is written."""
        from .compare import Rounding

        self.rounding = Rounding(self.binding.base)
        return self.rounding

    def judge(self) -> None:
        """Raises TargetError where quantising the merged weights so would lose the adapter."""
        tensors = self.binding.base.tensors
        coarse = [n for n in self.binding.bound if DTYPES[self.dtypes.get(n, tensors[n].dtype)].quantised]
        total = self.rounding.total(coarse) if self.rounding is not None else None
        if total is not None and total.lost and not self.allow_loss:
            again = any(DTYPES[tensors[name].dtype].quantised for name in self.binding.bound)
            better = "merge from the full-precision model (--base HF_DIR --like GGUF), " if again else ""
            raise TargetError(
                f"Stored like this (--gguf-type {self.choice}), {total.left:.0%} of the adapter would be left in the "
                f"weights, with an error of {total.error:.2f} times its size: rounding to these types undoes it. "
                f"Choose a wider type (q8_0, f16), {better}or insist with --allow-loss. Nothing was written."
            )

    @property
    def planned(self) -> dict[str, int]:
        """From which type to which → how many of the tensors that are computed."""
        before = self.binding.base.tensors
        names = {*self.binding.bound, *self.dtypes}
        return dict(Counter(f"{before[n].dtype} → {self.dtypes.get(n, before[n].dtype)}" for n in sorted(names)))

    @property
    def warnings(self) -> list[str]:
        """What is to be known of the result, once it is written."""
        total = self.rounding.total(self.binding.bound) if self.rounding is not None else None
        if total is None or total.error is None or total.gain is None:
            return []
        if total.change < 1e-6:
            return [f"The adapter hardly changes the weights (‖Δ‖/‖W'‖ = {total.change:.0e})."]
        if total.lost:
            return [f"{total.left:.0%} of the adapter is left after rounding; a wider --gguf-type keeps more of it."]
        if total.error > 1:
            return [
                f"Rounding adds an error of {total.error:.1f} times the adapter's size; a wider --gguf-type adds less."
            ]
        return []

    def report(self) -> dict[str, Any]:
        """For every tensor that was computed: types, gain, error; and the correlations of magnitudes."""
        before, measured = self.binding.base.tensors, self.rounding.tensors if self.rounding is not None else {}
        tensors = {
            name: {
                "from": before[name].dtype,
                "to": self.dtypes.get(name, before[name].dtype),
                "gain": rounded.gain,
                "error": rounded.error,
                "relative_error": rounded.relative,
            }
            for name, rounded in measured.items()
        }
        return {"type": self.choice, "tensors": tensors, "magnitude_correlation": self.correlations}


_WRITTEN = GGUF_WRITES | LIBGGUF_WRITES


def _roomy(kind: str, width: int) -> str:
    """The type in which a merged weight keeps its adapter: float as it is, of anything quantised Q8_0 or F16."""
    if not DTYPES[kind].quantised:
        return kind
    return "F16" if width % DTYPES["Q8_0"].block else "Q8_0"


def _model(base: Checkpoint) -> Model:
    dialect, values = of_gguf(base), settings(base)

    def number(key: str) -> int:
        value = values.get(f"{dialect.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    heads, heads_kv = (dialect.heads or (0,))[0], (dialect.heads_kv or (0,))[0]
    return Model(dialect.architecture, number("block_count"), heads, heads_kv, number("expert_count"))
