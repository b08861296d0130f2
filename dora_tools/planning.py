"""A merge of which everything is known and nothing is done yet, and doing it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import companions, hub
from .adapter import Unchanged
from .binding import Binding, bind
from .checkpoint import Checkpoint, Deferred
from .containers import lay_out
from .dtypes import DTYPES, dtype_named
from .errors import InputError, ResourceError, UsageError
from .formats import Given
from .layout import Computed, File, Layout, bytes_of
from .opening import AdapterLike, BaseLike, Input, base_of, inputs_of, left_out_notes, with_base, workers
from .selftest import check_table
from .storing import Storing
from .templates import Templated
from .write import Progress, check_file, check_room, check_target, write

if TYPE_CHECKING:
    from .merging import Merged


@dataclass(frozen=True)
class MergePlan:
    """A merge of which everything is known and nothing is done: see ``plan_merge``."""

    out: Path
    binding: Binding = field(repr=False)
    layout: Layout = field(repr=False)
    free: int
    threads: int
    merged: Deferred = field(repr=False)
    inputs: tuple[Input, ...] = field(repr=False)
    base_name: str
    source: Checkpoint = field(repr=False)
    options: dict[str, Any]
    with_card: bool
    said: list[str]
    storing: Storing | None = None  # of a GGUF

    @property
    def target(self) -> Path:
        """What the user named: the directory, or the file."""
        return self.out if self.with_card else self.out / self.layout.files[0].path

    @property
    def files(self) -> list[str]:
        """The names of everything that is written."""
        return [*(file.path for file in self.layout.files), *([companions.MANIFEST] if self.with_card else [])]

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: from reading, from binding."""
        left = [f"{i.name}: {said}" for i in self.inputs for said in left_out_notes(i.left_out)]
        return [*(n for i in self.inputs for n in i.adapter.notes), *left, *self.binding.notes, *self.said]

    def counts(self) -> dict[str, tuple[int, int]]:
        """What happens to the base's tensors: kind → (tensors, bytes written)."""
        rows = dict.fromkeys(("merged", "replaced", "added", "converted", "copied"), (0, 0))
        known = self.merged.tensors
        written = {p.name: p for f in self.layout.files for p in f.pieces if isinstance(p, Computed)}
        for name, info in known.items():
            kind = (
                "merged"
                if name in self.binding.bound
                else "added"
                if name in self.binding.added
                else "replaced"
                if name in self.binding.replaced
                else "converted"
                if name in written and written[name].dtype != info.dtype
                else "copied"
            )
            count, size = rows[kind]
            rows[kind] = count + 1, size + (written[name].length if name in written else info.nbytes)
        return {kind: row for kind, row in rows.items() if row[0]}

    @property
    def memory(self) -> int:
        """Estimated peak above ``import torch``, in bytes: buffers of the threads, and the factors in use."""
        factors = sorted(
            (4 * sum(b.delta.held for b in bounds) for bounds in self.binding.bound.values()), reverse=True
        )
        widest = max((i.width for n, i in self.merged.tensors.items() if n in self.binding.bound), default=0)
        return self.threads * 8 * max(1 << 20, 3 * widest) + 2 * sum(factors[:8]) + (24 << 20)

    def run(self, progress: Progress | None = None) -> Merged | None:
        """Write it. Returns the Merged that was computed, with its statistics; None where there was none to compute."""

        def closing() -> Iterable[File]:
            if self.storing is not None:
                self.storing.judge()
            return [self._manifest(self.result)] if self.with_card else []

        self.examine()
        write(
            self.merged,
            self.layout,
            self.out,
            threads=self.threads,
            progress=progress,
            closing=closing,
            check=not self.options["allow_nonfinite"],
            rounded=self.storing.measure() if self.storing is not None else None,
        )
        return self.result

    def examine(self) -> None:
        """Look into the values, where they tell whether a GGUF is the right base: adds notes. Raises FitError."""
        if self.storing is not None and not self.storing.examined:
            self.said.extend(self.storing.examine(self.threads))
            if isinstance(self.source, Templated):
                self.source.check(self.threads)
                self.said.extend(self.source.notes)

    @property
    def result(self) -> Merged | None:
        """What has been computed, once ``run`` has come that far."""
        return cast("Merged | None", self.merged.ready)

    def _manifest(self, result: Merged | None) -> File:
        from . import __version__

        modules: dict[str, Any] = {}
        for name, bounds in self.binding.bound.items():
            entry: dict[str, Any] = {"modules": sorted({b.module for b in bounds})}
            if result is not None:
                change = result.change(name)
                if self.options["stats"]:
                    entry["relative_change"] = change.relative if isfinite(change.relative) else None
                if change.zeros:
                    entry["rows_without_direction"] = change.zeros
            modules[name] = entry
        base_files = {}
        for file, header in sorted(self.merged.metadata.get("headers", {}).items()):
            info = [i for i in self.merged.tensors.values() if i.file == file]
            base_files[file] = {
                "header_sha256": hashlib.sha256(header.raw).hexdigest(),
                "size": len(header.raw) + sum(i.nbytes for i in info),
            }
        for file, gguf in self.merged.metadata.get("gguf", {}).items():
            base_files[file] = {"metadata_sha256": gguf.digest(), "size": gguf.path.stat().st_size}
        return companions.manifest(
            {
                "dora_tools": __version__,
                "base": {
                    "name": self.base_name,
                    "named_by_adapters": sorted({i.adapter.base_model for i in self.inputs if i.adapter.base_model}),
                    "files": base_files,
                },
                "adapters": [
                    {
                        "name": i.name,
                        "format": i.adapter.format,
                        "strength": i.strength,
                        "scaling": i.scaling(),
                        "sha256": i.digests(),
                    }
                    for i in self.inputs
                ],
                "options": self.options,
                **({"gguf": self.storing.report()} if self.storing is not None else {}),
                "merged": modules,
                "replaced": list(self.binding.replaced),
                "added": list(self.binding.added),
            }
        )


def plan_merge(
    adapter: AdapterLike | Sequence[AdapterLike],
    base: BaseLike | None,
    out: str | Path,
    *,
    strength: float | Sequence[float] = 1.0,
    dtype: str | None = None,
    device: str = "cpu",
    max_shard_size: str | int | None = None,
    stats: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    threads: int | None = None,
    format: str | None = None,
    given: Given | None = None,
    like: BaseLike | None = None,
    gguf_type: str | None = None,
    allow_loss: bool = False,
    untie: bool = False,
    modelfile: bool = False,
) -> MergePlan:
    """Read, bind, lay out and check a merge without writing anything: all that can fail from names, shapes and space.

    ``base`` None: the base that the adapter's file brings with it, or the model that it names. ``out``: a directory, or
    for a base that is one file also a ``.safetensors`` or ``.gguf`` file. The last five are for GGUF: ``like``, a GGUF
    of the same model as an HF ``base``, which is written in its shape; ``gguf_type``, auto, keep or one of
    ``recipes.MIXES``; ``allow_loss``, to keep a file that the adapter was rounded out of; ``untie`` (see ``bind``);
    ``modelfile``, to write one for Ollama. Raises any error of ``errors``.
    """
    if not str(out) or base == "":
        raise UsageError(f"{'OUT' if not str(out) else 'BASE'} is empty: is a shell variable not set?")
    limit = bytes_of(max_shard_size) if max_shard_size is not None else None
    check_table(format)
    inputs = inputs_of(adapter, strength, format, with_base(given, base))
    names = [i.adapter.base_model for i in inputs if i.adapter.base_model]
    if base is None:
        base, inputs = _their_base(inputs, names)
        if base in names:  # what only the base could tell
            inputs = inputs_of(adapter, strength, format, with_base(given, base))
    place = _place_of(base, names)
    checkpoint = base_of(place or base)
    if like is not None:
        checkpoint = Templated(base_of(like), checkpoint)
    in_gguf = "gguf" in checkpoint.metadata
    if in_gguf and dtype:
        raise UsageError("--dtype is for safetensors; of a GGUF, --gguf-type says how weights are stored.")
    if not in_gguf and (gguf_type is not None or untie or modelfile or allow_loss):
        raise UsageError("--gguf-type, --allow-loss, --untie and --modelfile are for a GGUF base, or with --like one.")
    one_file = place is not None and not place.is_dir() and limit is None
    folder, file = _destination(out, in_gguf, in_gguf or one_file, like is not None)
    binding = bind([(i.adapter, i.strength) for i in inputs], checkpoint, untie)
    storing = Storing(binding, "auto" if gguf_type is None else gguf_type, allow_loss) if in_gguf else None
    target = dtype_named(dtype) if dtype else None
    changed = {n: target for n, i in binding.base.tensors.items() if DTYPES[i.dtype].floating} if target else {}

    def make() -> Checkpoint:
        from .merging import Merged

        return Merged(binding, device, stats, allow_nonfinite)

    result = Deferred(binding.base, binding.bound, make)
    in_memory = place is None and limit is None and not in_gguf  # or a mixed file
    files = lay_out(
        result,
        dtypes=storing.dtypes if storing is not None else changed,
        max_shard_size=limit,
        file=file or ("model.safetensors" if in_memory else None),
        file_type=storing.file_type if storing is not None else None,
    )
    base_name, hub_id = _named_base(base, place, names)
    with_card, notes = file is None, list(storing.notes) if storing is not None else []
    if in_gguf and any(i.place is not None and companions.tokenizer_in(i.place) for i in inputs):
        notes.append(
            "The adapter has a tokenizer beside it, maybe with a chat template of its own; the GGUF keeps the base's. "
            "Where that matters, convert the merged Hugging Face model."
        )
    if modelfile and len(files) > 1:
        raise UsageError("Ollama reads no split files: join the base first (llama-gguf-split --merge).")
    if modelfile and not files[0].path.isprintable():
        raise UsageError(f"A Modelfile cannot name a file with line breaks ({files[0].path!r}).")
    if modelfile:
        files.append(File("Modelfile", (f"FROM ./{files[0].path}\n".encode(),)))
    if with_card:
        index = [f for f in files if f.path.endswith(".index.json")]  # what makes a directory look complete comes last
        files = [f for f in files if f not in index]
        files += _beside(place, binding, inputs, DTYPES[target].torch if target else None, notes)
        counted = (
            f"{len(binding.bound)} tensors merged, {len(binding.replaced) + len(binding.added)} replaced or added."
        )
        labels = [f"{i.name}, strength {i.strength:g}" if i.strength != 1 else i.name for i in inputs]
        files += [companions.card(folder.resolve().name, base_name, hub_id, labels, counted, in_gguf), *index]
    elif binding.config is not None:
        notes.append(f"One file cannot hold a config: {place}'s own config.json is not right for {out} as it is.")
    layout = Layout(files)
    template = hub.resolve(like, "base") if isinstance(like, str | Path) else None
    read_from = [p for p in (place, template, *(i.place for i in inputs)) if p is not None]
    if place is not None and place.is_dir() and place.resolve() in folder.resolve().parents:
        raise UsageError(f"{folder} lies inside the base {place}; write somewhere else.")
    if with_card:
        check_target(layout, folder, read_from, force)
    else:
        for written in files:
            check_file(folder / written.path, read_from, force)
    options = {
        "dtype": dtype,
        "device": device,
        "max_shard_size": max_shard_size,
        "stats": stats,
        "allow_nonfinite": allow_nonfinite,
        **({"gguf_type": gguf_type, "untie": untie} if in_gguf else {}),
        **({"like": str(like)} if like is not None else {}),
    }
    return MergePlan(
        folder,
        binding,
        layout,
        check_room(layout, folder),
        workers(threads),
        result,
        tuple(inputs),
        base_name,
        checkpoint,
        options,
        with_card,
        notes,
        storing,
    )


def _their_base(inputs: list[Input], names: Sequence[str]) -> tuple[BaseLike, list[Input]]:
    """The base that came with the adapters, in one of their files or by name; and the adapters as they fit it."""
    own = [i.base for i in inputs if i.base is not None]
    if not own and not names:
        raise UsageError("The adapter does not name its base model; give it with --base.")
    if len(own) > 1:
        raise UsageError("Several of the files hold a whole model; say which one to merge into with --base.")
    if not own and len(set(names)) > 1:
        raise UsageError(f"The adapters name several bases, {' and '.join(sorted(set(names)))}; give one with --base.")
    if own:  # what the file holds whole is that base already
        inputs = [into_its_own(i) if i.base is own[0] else i for i in inputs]
    return own[0] if own else names[0], inputs


def _place_of(base: BaseLike, names: Sequence[str]) -> Path | None:
    """Where the base lies; None for one in memory."""
    try:
        return hub.resolve(base, "base") if isinstance(base, str | Path) else None
    except (InputError, ResourceError) as error:
        if base in names:
            raise type(error)(
                f"{error} That is the base which the adapter names; say where it is with --base."
            ) from error
        raise


def _destination(out: str | Path, in_gguf: bool, one_file: bool, shaped: bool) -> tuple[Path, str | None]:
    """The folder to write, and the file's name if ``out`` is a file. Raises UsageError where it cannot be one."""
    path = Path(out)
    if path.suffix not in (".safetensors", ".gguf"):
        if shaped:
            raise UsageError(f"With --like, OUT is a .gguf file, not {out}.")
        return path, None
    if in_gguf != (path.suffix == ".gguf"):
        way = "give a .gguf file or a directory" if in_gguf else "a GGUF needs a GGUF base, or --like one"
        raise UsageError(f"{out} is not what this base is merged into: {way}.")
    if not one_file:
        raise UsageError(f"{out} names one file, which needs a base that is one file; give a directory.")
    return path.parent, path.name


def _beside(
    place: Path | None, binding: Binding, inputs: Sequence[Input], dtype: str | None, notes: list[str]
) -> list[File]:
    """The small files of the base, edited as the merge wants it, with the adapter's own tokenizer if there is one."""
    config = binding.config if binding.config is not None else binding.base.metadata.get("config")
    if place is None or not place.is_dir():
        return [File("config.json", (companions.as_json(config or {}),))] if binding.config is not None else []
    own = [i.place for i in inputs if i.place is not None and companions.tokenizer_in(i.place)]
    tokenizer = own[0] if len(own) == len(inputs) == 1 else None
    if tokenizer is not None:
        notes.append("The tokenizer is the one that was saved with the adapter.")
    elif own:
        notes.append("Of several adapters with tokenizers none is taken: the tokenizer is the base's.")
    return companions.copied(place, config, dtype, tokenizer)


def into_its_own(item: Input) -> Input:
    """The adapter of a file that is also the base: its trained tensors are there, and maybe its update."""
    if item.merged is None:
        raise InputError(
            f"{item.name}: such layers add the update to their own weights when they are put in eval mode, and the "
            "file does not say in which mode it was saved. If after model.eval(), say --saved-in eval (the weights "
            "are taken as they are); if while training, --saved-in train; or give the original --base."
        )
    adapter = replace(item.adapter, replaced={})
    if item.merged:
        as_it_is = tuple(replace(u, delta=Unchanged(u.delta.shape), magnitude=None) for u in adapter.updates)
        note = "The file was saved in eval mode, so its weights hold the update already; they are taken as they are."
        adapter = replace(adapter, updates=as_it_is, notes=(*adapter.notes, note))
    return replace(item, adapter=adapter)


def _named_base(base: BaseLike, place: Path | None, claimed: Sequence[str]) -> tuple[str, str | None]:
    """What the base is called, with the commit if it is a hub snapshot; and its hub id as far as it is known.

    A local directory has the id that all adapters agree on, if that is one.
    """
    if place is None or not isinstance(base, str | Path):
        return "(in the adapter's file or in memory)", None
    if Path(base).exists():
        agreed = claimed[0] if len(set(claimed)) == 1 and hub.is_id(claimed[0]) else None
        return str(base), agreed
    name = str(base).partition("@")[0]
    commit = place.name if place.parent.name == "snapshots" else ""
    return f"{base} ({commit})" if commit else str(base), name
