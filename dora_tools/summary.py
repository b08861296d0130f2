"""What is in an adapter: one description, as data, as JSON, as a table, as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import Adapter, LowRank, Update
from .checkpoint import Checkpoint
from .deltas import Started
from .errors import ResourceError, UnsupportedError, UsageError
from .layout import human
from .names.gguf import HEAD, of_gguf, settings

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "dora-tools/inspect/1"


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One module: ``shape`` is (out, in); ``change`` is ‖s·BA‖ (Frobenius), only where values were read."""

    module: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    scaling: float | None
    scaling_source: str
    dtype: str
    magnitude: str | None
    parameters: int
    base_tensor: str | None = None
    change: float | None = None
    magnitude_mean: float | None = None
    magnitude_std: float | None = None


@dataclass(frozen=True)
class Summary:
    """An adapter described without its values (or, with ``stats``, with a few numbers made from them)."""

    path: str
    format: str
    method: str
    base_model: str | None
    modules: tuple[ModuleSummary, ...]
    replaced: Mapping[str, tuple[int, ...]]
    left_out: Mapping[str, str]
    parameters: int
    notes: tuple[str, ...]
    schema: str = field(default=SCHEMA)

    def as_json(self) -> dict[str, Any]:
        """The versioned schema of ``--json``."""
        return {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}}

    def table(self) -> Iterator[RenderableType]:
        """For people: a headline, then a line for each group of like modules, then what else there is."""
        from rich.table import Table

        yield (
            f"{self.method} adapter, format {self.format}, {len(self.modules)} modules, "
            f"{self.parameters:,} parameters; base: {self.base_model or 'not recorded'}"
        )
        groups: dict[tuple[Any, ...], list[ModuleSummary]] = defaultdict(list)
        for m in self.modules:
            last = m.module.rpartition(".")[2]
            groups[last, m.kind, m.shape, m.rank, m.scaling, m.scaling_source, m.dtype, m.magnitude].append(m)
        measured = any(m.change is not None for m in self.modules)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("modules", "count", "kind", "out × in", "rank", "scaling", "dtype", "magnitude"):
            table.add_column(head, justify="right" if head in {"count", "rank"} else "left")
        if measured:
            table.add_column("‖s·BA‖ (mean)", justify="right")
        for key, members in groups.items():
            last, kind, (out, in_), rank, scaling, source, dtype, magnitude = key
            size = f"{out} × {in_}".replace("-1", "?")
            scale = f"{scaling:g} = {source}" if scaling is not None else "–"
            row = [last, str(len(members)), kind, size, "–" if rank is None else str(rank), scale, dtype]
            row.append(magnitude or "–")
            if measured:
                row.append(f"{sum(m.change or 0.0 for m in members) / len(members):.4g}")
            table.add_row(*row)
        yield table
        for name, shape in self.replaced.items():
            yield f"replaces {name} {list(shape)}"
        for name, reason in self.left_out.items():
            yield f"left out {name}: {reason}"
        for note in self.notes:
            yield f"note: {note}"

    def plot(self, path: Path) -> None:
        """A bar for each module's ‖s·BA‖, as an image. Raises ResourceError without the ``plot`` extra."""
        try:
            import matplotlib
        except ImportError as error:
            raise ResourceError("Plots need matplotlib: pip install 'dora-tools[plot]'.") from error
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, max(2.0, 0.16 * len(self.modules))), layout="constrained")
        axes.barh([m.module for m in self.modules], [m.change or 0.0 for m in self.modules])
        axes.invert_yaxis()
        axes.set_xlabel("‖s·BA‖ (Frobenius)")
        axes.tick_params(axis="y", labelsize=5)
        axes.set_title(f"{self.method}, base {self.base_model or 'not recorded'}")
        try:
            figure.savefig(path, dpi=120)
        except ValueError as error:
            raise UsageError(f"{path} cannot be drawn: {error}") from error
        pyplot.close(figure)


@dataclass(frozen=True)
class ModelSummary:
    """A GGUF model described by its header: ``types`` is stored type → (tensors, elements, bytes).

    ``layout``: what an adapter's rows go through to fit, or why none can be merged.
    """

    path: str
    architecture: str
    name: str | None
    files: int
    tensors: int
    parameters: int
    nbytes: int
    types: Mapping[str, tuple[int, int, int]]
    settings: Mapping[str, Any]
    tied: bool
    layout: str
    schema: str = field(default="dora-tools/inspect-model/1")

    def as_json(self) -> dict[str, Any]:
        """The versioned schema of ``--json``."""
        return {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}}

    def table(self) -> Iterator[RenderableType]:
        """For people: a headline, the stored types, then settings."""
        from rich.table import Table

        yield (
            f"GGUF model, architecture {self.architecture}{f', {self.name}' if self.name else ''}: {self.tensors} "
            f"tensors, {self.parameters:,} parameters, {human(self.nbytes)} in {self.files} file(s)"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("type", "tensors", "parameters", "bytes"):
            table.add_column(head, justify="left" if head == "type" else "right")
        for kind, (count, elements, size) in self.types.items():
            table.add_row(kind, str(count), f"{elements:,}", human(size))
        yield table
        yield ", ".join(f"{key} {value}" for key, value in self.settings.items())
        yield "The head is the embedding (tied)." if self.tied else "The head has a tensor of its own."
        yield self.layout


def summarise_model(checkpoint: Checkpoint, path: str) -> ModelSummary:
    """Describe a GGUF model by names, shapes and metadata."""
    values = settings(checkpoint)
    types: dict[str, tuple[int, int, int]] = {}
    for info in checkpoint.tensors.values():
        count, elements, size = types.get(info.dtype, (0, 0, 0))
        types[info.dtype] = count + 1, elements + info.numel, size + info.nbytes
    architecture = str(values.get("general.architecture"))
    try:
        permutes = of_gguf(checkpoint).permutes
        layout = "Adapters can be merged" + (": the rows of q and k are reordered within each head." * permutes or ".")
    except UnsupportedError as error:
        layout = str(error)
    wanted = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
              "attention.head_count_kv", "expert_count", "context_length", "vocab_size")  # fmt: skip
    found = {key: values[f"{architecture}.{key}"] for key in wanted if f"{architecture}.{key}" in values}
    name = values.get("general.name")
    return ModelSummary(
        path,
        architecture,
        name if isinstance(name, str) else None,
        len(checkpoint.metadata["gguf"]),
        len(checkpoint.tensors),
        sum(elements for _, elements, _ in types.values()),
        sum(size for _, _, size in types.values()),
        dict(sorted(types.items(), key=lambda item: -item[1][2])),
        found,
        HEAD not in checkpoint.tensors,
        layout,
    )


def summarise(
    adapter: Adapter,
    path: str,
    left_out: Mapping[str, str],
    stats: bool = False,
    placed: Mapping[str, str] | None = None,
) -> Summary:
    """Describe an adapter. ``placed``: module → base tensor, where a base was given; ``stats`` reads the values."""
    modules = tuple(_module(update, stats, (placed or {}).get(update.module)) for update in adapter.updates)
    replaced = {name: r.tensor.shape for name, r in adapter.replaced.items()}
    method = "DoRA" if adapter.is_dora else "LoRA" if modules else "trained tensors"
    of_peft = adapter.extra.get("peft", {}).get("peft_type")
    if of_peft not in (None, "LORA") and any(not isinstance(u.delta, LowRank) for u in adapter.updates):
        method = str(of_peft)
    return Summary(
        path,
        adapter.format,
        method,
        adapter.base_model,
        modules,
        replaced,
        left_out,
        sum(m.parameters for m in modules),
        adapter.notes,
    )


def _module(update: Update, stats: bool, base_tensor: str | None) -> ModuleSummary:
    delta, m = update.delta, update.magnitude
    inner = delta.delta if isinstance(delta, Started) else delta
    low = inner if isinstance(inner, LowRank) else None
    change = mean = std = None
    if stats and low is not None:
        a, b = low.lora_A.load().double(), low.lora_B.load().double()
        change = abs(low.scaling) * float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
        if m is not None:
            vector = m.vector.load().double()
            mean, std = float(vector.mean()), float(vector.std(correction=0))
    extra = (m.vector.shape[0] if m else 0) + (update.bias.shape[0] if update.bias else 0)
    return ModuleSummary(
        update.module,
        update.kind,
        delta.shape,
        low.rank if low else None,
        low.scaling if low else None,
        low.source if low else "",
        low.lora_A.dtype if low else "",
        m.axis if m else None,
        delta.parameters + extra,
        base_tensor,
        change,
        mean,
        std,
    )
