"""How the tensors of a merged GGUF are stored, and what that does to the adapter.

Rounding a merged weight back to the 4-bit lattice of its base undoes most of a fine-tune: steps smaller than half the
lattice's are rounded away. So what is merged into a quantised base becomes Q8_0 unless something else is asked for,
the loss is measured while the file is written, and a file that the adapter is not in is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .binding import Binding
from .dtypes import DTYPES, GGUF_WRITES, LIBGGUF_WRITES
from .errors import TargetError
from .names.gguf import of_gguf
from .recipes import FILE_TYPES, MIXES, Model, types_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .compare import Rounding

CHOICES = ("auto", "keep", *MIXES)
_KEPT_AT_LEAST, _KEPT_AT_MOST = 0.5, 1.5  # of the adapter: outside of that, another model would be written


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
        tensors = self.binding.base.tensors
        touched = {*self.binding.bound, *self.binding.replaced, *self.binding.added}
        if self.choice == "auto":
            found = {n: _roomy(i.dtype, i.width) for n, i in tensors.items() if n in touched}
        elif self.choice == "keep":
            found = {n: i.dtype for n, i in tensors.items() if n in touched}
            lost = [n for n, kind in found.items() if DTYPES[kind].quantised and kind not in _WRITTEN]
            if lost:
                raise TargetError(
                    f"{lost[0]} is stored as {found[lost[0]]}, which nothing here can write. Leave --gguf-type keep "
                    "out, and it becomes Q8_0."
                )
        else:
            stored = {name: (info.dtype, info.shape) for name, info in tensors.items()}
            found = types_of(self.choice, stored, _model(self.binding.base))
        self.dtypes = {name: kind for name, kind in found.items() if kind != tensors[name].dtype}

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
        return [
            f"{len(again)} tensors are quantised a second time ({before[again[0]].dtype} to {self.dtypes[again[0]]}, "
            "and others): merging from the full-precision model (--base HF_DIR --like this GGUF) loses less."
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
        """Raises TargetError where storing the merged weights so would lose the adapter."""
        total = self.rounding.total(self.binding.bound) if self.rounding is not None else None
        if total is None or total.gain is None or self.allow_loss:
            return
        if not _KEPT_AT_LEAST <= total.gain <= _KEPT_AT_MOST:
            tensors = self.binding.base.tensors
            again = any(DTYPES[tensors[name].dtype].quantised for name in self.binding.bound)
            better = "merge from the full-precision model (--base HF_DIR --like GGUF), " if again else ""
            raise TargetError(
                f"Stored like this (--gguf-type {self.choice}), {total.gain:.0%} of the adapter would be left in the "
                f"weights, with an error of {total.error:.2f} times its size: rounding to these types undoes it. "
                f"Choose a wider type (q8_0, f16), {better}or insist with --allow-loss. Nothing was written."
            )

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
    dialect = of_gguf(base)
    values: Mapping[str, Any] = next(iter(base.metadata["gguf"].values())).values

    def number(key: str) -> int:
        value = values.get(f"{dialect.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    heads, heads_kv = (dialect.heads or (0,))[0], (dialect.heads_kv or (0,))[0]
    return Model(dialect.architecture, number("block_count"), heads, heads_kv, number("expert_count"))
