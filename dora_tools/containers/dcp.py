"""Directories of torch.distributed.checkpoint (DCP), and Lightning's sharded checkpoints, which are such directories.

``.metadata`` is a pickle that says which chunks each tensor was cut into and which bytes of which ``.distcp`` file
hold each chunk; those bytes are a file of torch.save of their own. Opening reads ``.metadata`` (and Lightning's
``meta.pt``) and runs nothing; rows are read from the chunks that overlap them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint import Span, TensorInfo
from ..dtypes import DTYPES, working
from ..errors import InputError, UnsupportedError
from .pickles import Inert, brief, printable
from .safetensors import shard_paths
from .torch_pickle import MAX_NAME, TorchFile, open_torch, read_pickle

if TYPE_CHECKING:
    import torch

METADATA, META = ".metadata", "meta.pt"
OPEN_ENTRIES = 128  # each holds a file descriptor, of which a process may often have no more than 256
MAX_SIZE = 1 << 62
_DTYPES = {kind.torch: name for name, kind in DTYPES.items() if kind.torch}
_Key = tuple[str, tuple[int, ...] | None]  # a tensor's name and a chunk's offset
_UNFIT = "The checkpoint is damaged, or mixed from several saves: copy it again, or save it anew."


class Entry(NamedTuple):
    """Bytes of a ``.distcp`` file that are a file of torch.save."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box cut out of a tensor: where it begins, its shape, and where its values lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    entry: Entry

    def runs(self, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first row in the chunk, first row in the tensor, count) of what it holds of the tensor's rows [start, stop).

        Rows are counted over all dimensions but the last; within a run, both counts go up by one.
        """
        dims = len(shape) - 1 if len(shape) > 1 else len(shape)
        outer = max((d for d in range(dims) if self.sizes[d] != shape[d]), default=0)  # behind it, dimensions are whole
        count, length = prod(self.sizes[:outer]), prod(self.sizes[outer:dims])

        def first(run: int) -> int:
            row, step = 0, 1
            for d in reversed(range(dims)):
                run, place = divmod(run, self.sizes[d]) if d < outer else (run, 0)
                row, step = row + (self.offsets[d] + place) * step, step * shape[d]
            return row

        for run in range(max(0, bisect_right(range(count), start, key=first) - 1), count):
            low, high = max(first(run), start), min(first(run) + length, stop)
            if low < high:
                yield run * length + low - first(run), low, high - low
            elif low >= stop:
                return


@dataclass(frozen=True)
class DcpCheckpoint:
    """See Checkpoint. Keys of ``metadata``: ``objects``: name → a function that reads what was no tensor, as plain
    values and `Inert`s; ``opaque``: name → what it is, for tensors that are not read; ``meta``: what Lightning's
    meta.pt holds (hyper-parameters, counters), where there is one.
    """

    chunks: Mapping[str, Sequence[Chunk]]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]
    _opened: Callable[[Path, int, int], TorchFile] = field(default_factory=lambda: lru_cache(OPEN_ENTRIES)(open_torch))

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) as a (rows, width) tensor. Raises InputError where an entry is not what it should be."""
        import torch

        info, chunks = self.tensors[name], self.chunks[name]
        if len(chunks) == 1:
            return self._file(name, chunks[0]).read("object", start, stop, out)
        start, stop, _ = slice(start, stop).indices(info.rows)
        count = max(0, stop - start)
        rows = torch.empty(count, info.width, dtype=working(info.dtype)) if out is None else out.view(count, info.width)
        for chunk in chunks:
            left = chunk.offsets[-1] if len(info.shape) > 1 else 0
            width = chunk.sizes[-1] if len(info.shape) > 1 else 1
            for inner, row, many in chunk.runs(info.shape, start, stop):
                part = rows[row - start : row - start + many, left : left + width]
                self._file(name, chunk).read("object", inner, inner + many, part)
        return rows if out is None else out

    def span(self, name: str) -> Span | None:
        """Where the tensor lies in a file; None where it was cut into chunks. Opens its entry to find that."""
        chunks = self.chunks[name]
        return self._file(name, chunks[0]).span("object") if len(chunks) == 1 else None

    def _file(self, name: str, chunk: Chunk) -> TorchFile:
        """The file of torch.save that holds a chunk, if it is what ``.metadata`` says."""
        path, offset, length = chunk.entry
        where = f"Tensor '{name}' (bytes {offset} to {offset + length} of {path})"
        try:
            file = self._opened(path, offset, length)
        except InputError as error:
            raise type(error)(f"{where}: {error}") from error
        found, wanted = file.records.get("object"), (self.tensors[name].dtype, chunk.sizes)
        if found is None:
            what = file.metadata["opaque"].get("object") or _kind(file.metadata["object"])
            raise UnsupportedError(f"{where} is stored as {what}; only plain dense tensors are read. Save it as one.")
        if (found.dtype, found.shape) != wanted:
            raise InputError(
                f"{where} is {found.dtype} of shape {found.shape}, but {METADATA} says {wanted[0]} of shape "
                f"{wanted[1]}. {_UNFIT}"
            )
        return file


def is_dcp(folder: Path) -> bool:
    """Whether this is what DCP writes, of any kind: `open_dcp` reads it, or says by name why not."""
    patterns = ("*.distcp", "__*.metadata", "shard-*-model-*-of-*.safetensors")
    return (folder / METADATA).is_file() or any(any(folder.glob(pattern)) for pattern in patterns)


def open_dcp(folder: Path) -> DcpCheckpoint:
    """Open a directory of torch.distributed.checkpoint; names are the flat ones that it uses (``state_dict.a.weight``).

    Raises InputError where it is damaged or contradicts itself; UnsupportedError for what is recognised and not read:
    compressed entries, metadata of single ranks or of other programs, the ranks' shards as safetensors.
    """
    path = folder / METADATA
    if not path.is_file():
        raise _no_metadata(folder)
    found = read_pickle(path)
    try:
        chunks, tensors, metadata = _contents(path, _attributes(found, "Metadata", "the pickle"))
    except ValueError as error:
        raise InputError(f"{path}: {error}. {_UNFIT}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    if (folder / META).is_file():
        metadata["meta"] = open_torch(folder / META).metadata["object"]
    return DcpCheckpoint(chunks, tensors, metadata)


def _no_metadata(folder: Path) -> InputError:
    if any(folder.glob("__*.metadata")):
        return UnsupportedError(
            f"{folder} holds one metadata file for each rank (__0.metadata …), as use_collectives=False writes them; "
            "that is not read. Load it with torch.distributed.checkpoint on as many ranks and save it anew."
        )
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        return UnsupportedError(
            f"{folder} holds the ranks' shards of a distributed save as safetensors, without a list of them, so a "
            "missing one could not be noticed. Join them with consolidate_safetensors_files of "
            "torch.distributed.checkpoint, and give the result."
        )
    return InputError(
        f"{folder} has no {METADATA}, which says where in the .distcp files each tensor lies: a hidden file that is "
        "easily left out when copying, or the save did not finish."
    )


def _contents(
    path: Path, top: Mapping[Any, Any]
) -> tuple[dict[str, list[Chunk]], dict[str, TensorInfo], dict[str, Any]]:
    """Chunks, tensors and metadata of a checkpoint. Raises ValueError where ``.metadata`` contradicts itself."""
    entries = _entries(path, _table(top.get("storage_data"), "storage_data"))
    chunks, tensors = dict[str, list[Chunk]](), dict[str, TensorInfo]()
    objects, opaque = dict[str, Callable[[], Any]](), dict[str, str]()
    for name, value in _table(top.get("state_dict_metadata"), "state_dict_metadata").items():
        where = _name(name)
        if isinstance(value, Inert) and value.name == "BytesStorageMetadata" and value.module.startswith("torch."):
            objects[name] = _object(_entry(entries, name, None))
            continue
        stored = _attributes(value, "TensorStorageMetadata", where)
        dtype, what = _dtype(stored.get("properties"), where)
        if dtype is None:
            opaque[name] = what
            continue
        tensors[name] = TensorInfo(dtype, _sizes(stored.get("size"), where), path.parent.resolve().name)
        chunks[name] = _chunks(stored.get("chunks"), name, tensors[name], entries)
    return chunks, tensors, {"objects": objects, "opaque": opaque}


def _object(entry: Entry) -> Callable[[], Any]:
    return lambda: open_torch(*entry).metadata["object"]


def _attributes(value: Any, kind: str, where: str) -> dict[Any, Any]:
    """The attributes of an object of one of DCP's classes, which lie in other modules of torch in older versions."""
    if isinstance(value, Inert) and (value.name, value.args) == (kind, ()) and value.module.startswith("torch."):
        return value.attributes
    raise UnsupportedError(
        f"{where} is {_kind(value)}, expected a {kind} of torch.distributed.checkpoint. If another program wrote this, "
        "load it there and save it with torch.save."
    )


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, Inert) else f"a {type(value).__name__}"


def _table(value: Any, what: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"{what} is a {type(value).__name__}, expected a dict")
    return value


def _name(name: Any) -> str:
    """A tensor's name in quotes, if it is fit to be printed."""
    if type(name) is not str or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{brief(name)} is no name of a tensor")
    return f"'{name}'"


def _sizes(value: Any, where: str, dims: int | None = None) -> tuple[int, ...]:
    """A shape or an offset."""
    if type(value) is not tuple or any(type(n) is not int or not 0 <= n < MAX_SIZE for n in value):
        raise ValueError(f"{where} has the size or offset {brief(value)}, expected integers from 0")
    if len(value) > 64 or dims not in (None, len(value)):
        raise ValueError(f"{where} has the size or offset {brief(value)}, expected {dims or 'at most 64'} dimensions")
    return value


def _dtype(properties: Any, where: str) -> tuple[str | None, str]:
    """The stored type, or None and what the tensor is instead."""
    attributes = _attributes(properties, "TensorProperties", where)
    state = properties.state if type(properties.state) is tuple else tuple(attributes.values())
    dtype, layout = (*state, None, None)[:2]
    if not isinstance(dtype, Inert) or dtype.module != "torch" or dtype.args is not None:
        raise ValueError(f"{where} has the type {brief(dtype)}, expected one of torch's dtypes")
    if isinstance(layout, Inert) and layout.args not in (None, ("torch.strided",)):
        return None, printable(f"a tensor of layout {brief(layout.args)}")
    return _DTYPES.get(dtype.name), printable(f"a tensor of torch.{dtype.name:.100}")


def _entries(path: Path, table: Mapping[Any, Any]) -> dict[_Key, Entry]:
    """Where each chunk lies. All files are plain names beside ``.metadata``, are there and are long enough."""
    found: dict[_Key, tuple[str, tuple[int, ...]]] = {}
    for index, info in table.items():
        key = _attributes(index, "MetadataIndex", "a key of storage_data")
        where = _name(key.get("fqn"))
        begin = None if key.get("offset") is None else _sizes(key["offset"], where)
        stored = _attributes(info, "_StorageInfo", where)
        if stored.get("transform_descriptors"):
            raise UnsupportedError(
                f"{where} was compressed or encrypted when it was saved ({brief(stored['transform_descriptors'])}); "
                "that is not read. Load it and save it without extensions."
            )
        place = _name(stored.get("relative_path"))[1:-1], _sizes((stored.get("offset"), stored.get("length")), where)
        if found.setdefault((key["fqn"], begin), place) != place:
            raise ValueError(f"{where} at {brief(begin)} is said to lie in two places")
    names = sorted({file for file, _ in found.values()})
    paths = dict(zip(names, shard_paths(path, {name: name for name in names}), strict=True))
    ends = {name: path.stat().st_size for name, path in paths.items()}
    for (name, _), (file, (offset, length)) in found.items():
        if offset + length > ends[file]:
            raise ValueError(
                f"'{name}' lies at bytes {offset} to {offset + length} of {file}, but that has {ends[file]} bytes: it "
                "was cut off, or is of another save"
            )
    return {key: Entry(paths[file], *place) for key, (file, place) in found.items()}


def _entry(entries: Mapping[_Key, Entry], name: str, offset: tuple[int, ...] | None) -> Entry:
    if (name, offset) not in entries:
        raise ValueError(f"storage_data does not say where '{name}' lies{'' if offset is None else f' from {offset}'}")
    return entries[name, offset]


def _chunks(value: Any, name: str, info: TensorInfo, entries: Mapping[_Key, Entry]) -> list[Chunk]:
    """The chunks of a tensor that have values. They cover it, each element once."""
    where, shape, chunks = f"a chunk of '{name}'", info.shape, list[Chunk]()
    for part in value if type(value) is list else ():
        stored = _attributes(part, "ChunkStorageMetadata", where)
        offsets, sizes = (_sizes(stored.get(key), where, len(shape)) for key in ("offsets", "sizes"))
        if any(o + n > size for o, n, size in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{where} of shape {sizes} from {offsets} goes beyond the tensor's shape {shape}")
        if not prod(sizes):  # of a rank beyond the last row
            continue
        chunks.append(Chunk(offsets, sizes, _entry(entries, name, offsets)))
        if info.bytes_of(prod(sizes)) > chunks[-1].entry.length:
            raise ValueError(f"{where} is {info.dtype} of shape {sizes}, in only {chunks[-1].entry.length} bytes")
    covered = sum(prod(chunk.sizes) for chunk in chunks)
    if covered != prod(shape) or not _apart(chunks, len(shape)):
        raise ValueError(
            f"the {len(chunks)} chunks of '{name}' have {covered} elements, and its shape {shape} has {prod(shape)}: "
            "some are missing, or overlap"
        )
    return chunks


def _apart(chunks: list[Chunk], dims: int) -> bool:
    """Whether no two chunks overlap: straight cuts through the whole must separate them, as those of DTensor do."""
    todo = [(chunks, 0, 0)]
    while todo:
        group, dim, stuck = todo.pop()
        if len(group) < 2:
            continue
        if stuck == dims:
            return False
        groups: list[list[Chunk]] = []
        end = 0
        for chunk in sorted(group, key=lambda chunk: chunk.offsets[dim]):
            if not groups or chunk.offsets[dim] >= end:
                groups.append([])
            groups[-1].append(chunk)
            end = max(end, chunk.offsets[dim] + chunk.sizes[dim])
        todo += [(part, (dim + 1) % dims, stuck + 1 if len(groups) == 1 else 0) for part in groups]
    return True
