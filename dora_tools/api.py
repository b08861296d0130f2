"""The operations, each composed of the rest in a few lines: what the command line and Python users call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import containers, formats, hub
from .adapter import Adapter, Axis, Replacement
from .binding import bind
from .checkpoint import Checkpoint, equal, ref
from .containers import lay_out
from .deltas import Tokens
from .dtypes import dtype_named
from .errors import InputError, TargetError, UsageError
from .formats import Given
from .layout import File, Layout
from .names.gguf import settings
from .names.places import found
from .names.ties import may_be_tied
from .opening import (
    AdapterLike,
    BaseLike,
    adapter_home,
    base_of,
    hf_base,
    inputs_of,
    left_out_notes,
    opened,
    read,
    strengths_of,
    with_base,
    workers,
)
from .opening import open_checkpoint as open_checkpoint
from .opening import read_adapter as read_adapter
from .planning import MergePlan as MergePlan
from .planning import into_its_own
from .planning import plan_merge as plan_merge
from .selftest import check_table
from .summary import ModelSummary, Summary, summarise, summarise_model
from .write import Progress, check_file, check_room, check_target, write

if TYPE_CHECKING:
    from .merging import LazyTensors
    from .operations.dora import Init
    from .operations.outcome import Outcome


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    format: str = "peft",
    force: bool = False,
    sources: Iterable[Path] = (),
    *,
    like: BaseLike | None = None,
    arch: str | None = None,
    fold_scaling: bool = False,
) -> tuple[str, ...]:
    """Write an adapter as a directory of another tool; returns what its user must know.

    ``path`` may name the file, where the format is one file. ``like`` and ``arch``: the model (HF or GGUF) or the GGUF
    architecture that it is written for, where the format depends on that. ``fold_scaling``: a PEFT adapter with one
    rank and scaling 1 for all modules. Raises TargetError for what that format cannot hold, and UsageError for an
    output that is there or is a source.
    """
    writer = formats.named(format).write
    if writer is None:
        raise TargetError(f"Format '{format}' can be read, not written.")
    if format != "peft":
        _check_plain(adapter, format)
    written = writer(
        adapter, formats.Target(arch, cache(lambda: base_of(like)) if like is not None else None, fold_scaling)
    )
    if like is not None and formats.named(format).for_model:
        bind([(adapter, 1.0)], base_of(like))  # whatever has no place in it, or another shape, is refused here
    folder, name = Path(path), written.file
    single = folder.suffix == Path(name).suffix == ".gguf"
    if single:
        folder, name = folder.parent, folder.name
    files = lay_out(written.tensors, file=name)
    files += [File(name, (data,)) for name, data in written.documents.items()]
    layout = Layout(files)
    if single:
        check_file(folder / name, sources, force)
    else:
        check_target(layout, folder, sources, force)
    check_room(layout, folder)
    write(written.tensors, layout, folder)
    return written.notes


def _check_plain(adapter: Adapter, format: str) -> None:
    """Raises TargetError for what only PEFT's format has."""
    stacked = format != "gguf" and any(u.kind == "expert" for u in adapter.updates)
    odd = next((u.name for u in adapter.updates if u.parameter != "weight" or isinstance(u.delta, Tokens)), None)
    if adapter.layers or odd or stacked:
        what = "replicated layers" if adapter.layers else odd or "experts that share a tensor"
        raise TargetError(
            f"Format '{format}' has no way to say that the adapter is of {what}. Write it as peft, or merge it."
        )


def check_output(
    path: str | Path, format: str, force: bool, sources: Iterable[Path], like: BaseLike | None = None
) -> None:
    """What ``write_adapter`` would refuse whatever the adapter is. Raises UsageError, TargetError."""
    check_table(format)
    if formats.named(format).write is None:
        raise TargetError(f"Format '{format}' can be read, not written.")
    if formats.named(format).for_model and like is None:
        raise UsageError(f"--to {format} needs --base, the model that the adapter is to fit.")
    folder = Path(path)
    if folder.suffix == ".gguf" and format == "gguf":
        check_file(folder, sources, force)
        return
    if not force:
        check_target(Layout([]), folder, sources, force)
    for source in sources:
        if folder.exists() and source.samefile(folder):
            raise UsageError(f"{folder} is an input; write somewhere else.")


def convert(
    path: str | Path,
    out: str | Path,
    to: str,
    format: str | None = None,
    given: Given | None = None,
    force: bool = False,
    base: BaseLike | None = None,
    like: BaseLike | None = None,
    arch: str | None = None,
    fold_scaling: bool = False,
) -> tuple[str, ...]:
    """An adapter in another tool's format; returns notes: what was unusual, left aside, or must be known to use it.

    ``base``: the model it was trained on, for formats that leave the kind of a layer to it. ``like`` (a GGUF of that
    model) or ``arch`` (its GGUF architecture): for whom a GGUF adapter is written; else ``base`` tells. Raises
    InputError for what cannot be read and TargetError for what ``to`` cannot hold.
    """
    if not formats.named(to).for_model and (like is not None or arch is not None):
        raise UsageError("--like and --arch say for which model a GGUF adapter is written; they are for --to gguf.")
    if fold_scaling and to != "peft":
        raise UsageError("--fold-scaling is for --to peft.")
    check_table(format)
    check_table(to)
    model = like if like is not None else base
    reading, place = read(path, format, with_base(given, model))
    if reading.doubt:
        raise InputError(reading.doubt)
    adapter, left = reading.adapter, tuple(left_out_notes(reading.left_out))
    if model is not None and adapter.replaced:
        adapter, same = _beside(adapter, hf_base(base if base is not None else model))
        left += (f"{same} tensors are as in the base and are left out.",) if same else ()
    elif reading.base is not None and adapter.replaced:
        left += (
            f"The file holds the whole model, so {len(adapter.replaced)} tensors that may not have been trained are "
            "carried along; with --base, those that are as in the base are left out.",
        )
    if model is not None and not formats.named(to).for_model:  # those are fitted when they are written
        bind([(adapter, 1.0)], base_of(model))
    models = [hub.resolve(m, "base") for m in (like, base) if isinstance(m, str | Path)]
    return (
        *adapter.notes,
        *left,
        *write_adapter(adapter, out, to, force, [place, *models], like=model, arch=arch, fold_scaling=fold_scaling),
    )


def _beside(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, int]:
    """An adapter without the whole tensors that are as in the base, and how many those are.

    Of the others, it says which the base ties to nothing.
    """
    there = found(base, list(adapter.replaced))
    untied = (base.metadata.get("config") or {}).get("tie_word_embeddings") is False
    kept: dict[str, Replacement] = {}
    for name, replacement in adapter.replaced.items():
        own = there.get(name)
        if own is not None and replacement.tensor.shape == own.shape:
            if equal(own, replacement.tensor):
                continue
            others = [n for n, i in base.tensors.items() if n != own.key and i.shape == own.shape and may_be_tied(n)]
            if untied or (others and not any(equal(own, ref(base, other)) for other in others)):
                replacement = replace(replacement, alone=True)
        kept[name] = replacement
    return replace(adapter, replaced=kept), len(adapter.replaced) - len(kept)


def inspect(
    path: str | Path,
    base: BaseLike | None = None,
    stats: bool = False,
    format: str | None = None,
    given: Given | None = None,
) -> Summary | ModelSummary:
    """What is in an adapter, or in a GGUF model.

    With ``base``, also where each module goes, refused as a merge would be; ``stats`` reads the values.
    """
    place = adapter_home(hub.resolve(path, "adapter"))
    opened = containers.open_checkpoint(place)
    if format is None and "gguf" in opened.metadata and settings(opened).get("general.type") != "adapter":
        if base is not None or stats:
            raise UsageError(f"{path} is a GGUF model, not an adapter; --base, --stats and --plot are for adapters.")
        return summarise_model(opened, str(path))
    given = given or Given()
    if base is None and given.initial is None:  # what it began with is said in a note
        given = replace(given, residual_base=True)
    reading = formats.read(opened, str(path), format, with_base(given, base))
    placed: dict[str, str] = {}
    if base is not None:
        binding = bind([(reading.adapter, 1.0)], base_of(base))
        placed = {b.module: name for name, bounds in binding.bound.items() for b in bounds if name.endswith("weight")}
    return summarise(reading.adapter, str(path), reading.left_out, stats, placed)


def suggest_format(path: str | Path) -> str:
    """A starter table (TOML) for an adapter of unknown format: see ``formats.table``. Raises InputError."""
    from .formats.table.starter import suggest

    place = hub.resolve(path, "adapter")
    return suggest(containers.open_checkpoint(place), place.stem)


def merged(
    adapter: AdapterLike | Sequence[AdapterLike],
    base: BaseLike | None = None,
    *,
    strength: float | Sequence[float] = 1.0,
    device: str = "cpu",
    format: str | None = None,
    given: Given | None = None,
) -> LazyTensors:
    """The merged model as a mapping of names to lazy tensors (``shape``, ``dtype``, ``[...]`` → tensor).

    Nothing is written; a tensor is computed when it is asked for, and only it. Fits transformers' ``state_dict=``; its
    ``config`` is the config.json that goes with it. ``base`` None: the one that came in the adapter's own file.
    """
    from .merging import LazyTensors, Merged

    inputs = inputs_of(adapter, strength, format, with_base(given, base))
    own = [i.base for i in inputs if i.base is not None]
    if base is None and len(own) == 1:
        inputs = [into_its_own(i) if i.base is not None else i for i in inputs]
        base = own[0]
    if base is None:
        raise UsageError("Say which base is meant, as the adapter brings none.")
    home = base_of(base)
    if "gguf" in home.metadata:
        raise UsageError("A GGUF base is merged into a file (dt.merge); lazy tensors are for Hugging Face models.")
    binding = bind([(i.adapter, i.strength) for i in inputs], home)
    config = binding.config if binding.config is not None else binding.base.metadata.get("config", {})
    return LazyTensors(Merged(binding, device), config)


def to_dora(
    adapter: AdapterLike,
    base: BaseLike | None = None,
    axis: Axis = "out",
    init: Init = "exact",
    *,
    format: str | None = None,
    given: Given | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """LoRA → DoRA initialisation (see ``operations.dora.to_dora``). ``base`` None: the model that the adapter names."""
    from .operations import dora

    (one,), home = opened([adapter], base, format, given)
    return dora.to_dora(one, home, axis, init, device=device, threads=workers(threads), progress=progress)


def to_lora(
    adapter: AdapterLike,
    base: BaseLike | None = None,
    *,
    force: bool = False,
    format: str | None = None,
    given: Given | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **ranks: Any,
) -> Outcome:
    """DoRA → the best LoRA (see ``operations.lora.to_lora``), with ``ranks`` as of ``Ranks``: rank=, energy=, …"""
    from .operations import lora
    from .operations.ranks import Ranks

    rule = Ranks(**ranks)
    (one,), home = opened([adapter], base, format, given)
    return lora.to_lora(
        [(one, 1.0)],
        home,
        rule,
        force=force,
        device=device,
        threads=workers(threads),
        seed=seed,
        progress=progress or (lambda _: None),
    )


def rescale(
    adapter: AdapterLike,
    *,
    base: BaseLike | None = None,
    alpha: float | None = None,
    rslora: bool | None = None,
    dtype: str | None = None,
    weighted: bool = False,
    refit: bool = False,
    format: str | None = None,
    given: Given | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    **ranks: Any,
) -> Outcome:
    """Another rank or alpha (see ``operations.rescale.rescale``), with ``ranks`` as of ``Ranks``: rank=, energy=, …"""
    from .operations import rescale as operation
    from .operations.ranks import Ranks

    rule = Ranks(**ranks) if any(value is not None for value in ranks.values()) else None
    (one,), home = opened([adapter], base, format, given, needed=False)
    return operation.rescale(
        one,
        rule,
        alpha=alpha,
        rslora=rslora,
        dtype=dtype_named(dtype) if dtype else None,
        base=home,
        weighted=weighted,
        refit=refit,
        device=device,
        threads=workers(threads),
        progress=progress,
    )


def combine(
    adapters: Sequence[AdapterLike],
    weights: float | Sequence[float] = 1.0,
    *,
    base: BaseLike | None = None,
    method: str = "linear",
    density: float | None = None,
    force: bool = False,
    format: str | None = None,
    given: Given | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **ranks: Any,
) -> Outcome:
    """Several adapters as one (see ``operations.combine.combine``); ``method`` and ``density`` as of ``Election``."""
    from .operations import combine as operation
    from .operations.ranks import Ranks

    election = None
    if method != "linear":
        election = operation.Election(method, 0.5 if density is None else density, seed)
    elif density is not None:
        raise UsageError(f"A density is for pruning: choose a method of {', '.join(operation.METHODS[1:])}.")
    rule = Ranks(**ranks) if any(value is not None for value in ranks.values()) else None
    each = strengths_of(weights, len(adapters), "adapters", "weights")
    found, home = opened(adapters, base, format, given, needed=False)
    return operation.combine(
        list(zip(found, each, strict=True)),
        rule,
        election,
        base=home,
        force=force,
        device=device,
        threads=workers(threads),
        seed=seed,
        progress=progress or (lambda _: None),
    )


def extract(
    base: BaseLike,
    tuned: BaseLike,
    *,
    dora: bool = False,
    save_rest: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **ranks: Any,
) -> Outcome:
    """The adapter between two dense models (see ``operations.extract.extract``), with ``ranks`` as of ``Ranks``."""
    from .operations import extract as operation
    from .operations.ranks import Ranks

    rule = Ranks(**ranks)
    return operation.extract(
        hf_base(base),
        hf_base(tuned),
        rule,
        dora=dora,
        save_rest=save_rest,
        device=device,
        threads=workers(threads),
        seed=seed,
        base_model=str(base) if isinstance(base, str | Path) else None,
        progress=progress or (lambda _: None),
    )


def merge(
    adapter: AdapterLike | Sequence[AdapterLike],
    base: BaseLike | None,
    out: str | Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> MergePlan:
    """Merge adapters into the dense weights of a base and write them as ``out``: see ``plan_merge`` for the options."""
    plan = plan_merge(adapter, base, out, **options)
    plan.run(progress)
    return plan
