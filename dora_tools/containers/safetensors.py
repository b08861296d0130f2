"""safetensors files and sharded directories: read by row ranges, laid out as the library's ``save_file`` would.

A header is validated by the library's own audited parser; what is read here again from the same bytes is only where
each tensor lies, plus what the library does not check: names that stand twice, and the index file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo
from ..dtypes import DTYPES
from ..errors import InputError, UsageError
from ..layout import Computed, File, Piece
from .source import Source, Stored

# save_file puts the types in this order, and names alphabetically within one (the library's enum, backwards)
_ORDER = [
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "F6_E3M2",
    "F6_E2M3",
    "F4",
    "BOOL",
]
INDEX = "model.safetensors.index.json"
_RANK = {name: rank for rank, name in enumerate(_ORDER)}


@dataclass(frozen=True)
class Header:
    """The head of one file: its bytes as they stand, where each tensor's data begin, and the free metadata."""

    raw: bytes
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


class SafetensorsCheckpoint(Stored):
    """One file, or the shards of a directory, as a Checkpoint. Keys of ``metadata``: ``headers`` (by file name)."""

    def __init__(self, files: Iterable[Path], metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        headers: dict[str, Header] = {}
        for path in files:
            source, header, tensors = _open(path)
            twice = self.tensors.keys() & tensors.keys()
            if twice:
                name = min(twice)
                raise InputError(
                    f"Tensor '{name}' stands in {self.tensors[name].file} and in {path.name}: one of the two is stale. "
                    "Keep the shards of one save only."
                )
            self.add(source, tensors, header.offsets)
            headers[path.name] = header
        self.metadata = {**(metadata or {}), "headers": headers}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json: an object, of which no key stands twice. Raises InputError."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise InputError(f"'{Counter(key for key, _ in pairs).most_common(1)[0][0]}' stands twice")
    return table


def _open(path: Path) -> tuple[Source, Header, dict[str, TensorInfo]]:
    from safetensors import SafetensorError, safe_open

    source = Source(path)
    if source.pread(0, min(source.size, 40)).startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from.")
    try:
        with safe_open(path, framework="np"):
            pass
        size = int.from_bytes(source.pread(0, 8), "little")
        raw = source.pread(0, 8 + size)
        table = json.loads(raw[8:], object_pairs_hook=unique)
    except (SafetensorError, OSError, ValueError, RecursionError, InputError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({error}). If it is what it should be, it was cut off or "
            "damaged on the way: compare its size with the original's and copy it again."
        ) from error
    metadata = table.pop("__metadata__", None) or {}
    offsets, tensors = {}, {}
    for name, entry in sorted(table.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: tensor '{name}' is stored as {entry['dtype']}, a type unknown to dora-tools.")
        offsets[name] = len(raw) + entry["data_offsets"][0]
        tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), path.name)
    return source, Header(raw, offsets, metadata), tensors


def open_index(index: Path, metadata: Mapping[str, Any] | None = None) -> SafetensorsCheckpoint:
    """The shards that an ``*.index.json`` names. Raises InputError where it lies about them."""
    table = read_index(index)
    weight_map = table["weight_map"]
    metadata = {**(metadata or {}), "index": (index.name, table.get("metadata"))}
    checkpoint = SafetensorsCheckpoint(shard_paths(index, weight_map), metadata)
    for name, file in weight_map.items():
        info = checkpoint.tensors.get(name)
        if info is None or info.file != file:
            where = f"lies in {info.file}" if info else "lies in none of them"
            raise InputError(f"{index} says that tensor '{name}' lies in {file}, but it {where}. Is a shard stale?")
    return checkpoint


def read_index(index: Path) -> dict[str, Any]:
    """An index file: ``weight_map`` is tensor name → shard name. Raises InputError for anything else."""
    try:
        if not index.is_file():
            raise ValueError("it is no ordinary file")
        table: dict[str, Any] = json.loads(index.read_bytes())
        weight_map = table["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError("its weight_map is empty or names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not the index of a sharded checkpoint: {error}.") from error
    return table


def shard_paths(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shard files of an index, in name order: plain names beside it that exist.

    A symlink may only point into its own directory or to ``../../blobs``, as those of the Hugging Face cache do.
    """
    folder = index.parent
    home = folder.resolve()
    allowed = {home, home.parent.parent / "blobs"}
    paths = []
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name:
            raise InputError(f"{index} names the shard '{name}', which is not a plain file name beside it.")
        if not path.is_file():
            missing = [n for n in sorted(set(weight_map.values())) if not (folder / n).is_file()]
            raise InputError(
                f"{index} names {len(set(weight_map.values()))} shards, and {len(missing)} of them are not there: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Complete the download."
            )
        if path.resolve().parent not in allowed:
            raise InputError(
                f"{path} is a link to {path.resolve()}, outside the checkpoint; copy the file here instead."
            )
        paths.append(path)
    return paths


def lay_out(
    checkpoint: Checkpoint,
    *,
    dtypes: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    file: str | None = None,
) -> list[File]:
    """The files of a safetensors output: weights first, then the index if there are several.

    ``dtypes`` says which tensors change their stored type. Files, names and order are the base's own, down to the
    header's bytes where nothing in it changes; ``max_shard_size`` (bytes) deals the tensors out again, ``file`` puts
    all into one. New headers are as ``safetensors.torch.save_file`` writes them.
    """
    tensors = {
        name: TensorInfo((dtypes or {}).get(name, info.dtype), info.shape, info.file, info.width)
        for name, info in checkpoint.tensors.items()
    }
    groups: dict[str, list[str]] = {}
    if max_shard_size is not None:
        groups = _deal(tensors, max_shard_size)
    else:
        for name, info in tensors.items():
            groups.setdefault(file or safetensors_name(info.file), []).append(name)
    headers: Mapping[str, Header] = checkpoint.metadata.get("headers", {})
    files = []
    for path in sorted(groups):
        wanted = {name: tensors[name] for name in groups[path]}
        raw = headers[path].raw if path in headers and _same(headers[path], wanted) else b""
        if raw:
            order: Iterator[str] = iter(headers[path].offsets)
        else:
            order = iter(sorted(wanted, key=lambda name: (_RANK[wanted[name].dtype], name)))
            wanted = {name: wanted[name] for name in order}
            raw, order = _header(wanted, headers.values()), iter(wanted)
        pieces: list[Piece] = [raw]
        for name in order:
            span = checkpoint.span(name) if wanted[name].dtype == checkpoint.tensors[name].dtype else None
            pieces.append(span or Computed(name, wanted[name].dtype, wanted[name].nbytes))
        files.append(File(path, tuple(pieces)))
    if len(groups) > 1 or ("index" in checkpoint.metadata and max_shard_size is None and file is None):
        files.append(_index(groups, tensors, checkpoint.metadata.get("index", (INDEX, None))))
    return files


def _same(header: Header, wanted: Mapping[str, TensorInfo]) -> bool:
    table = json.loads(header.raw[8:])
    table.pop("__metadata__", None)
    now = {name: (info.dtype, list(info.shape)) for name, info in wanted.items()}
    return now == {name: (entry["dtype"], entry["shape"]) for name, entry in table.items()}


def _header(wanted: Mapping[str, TensorInfo], old: Iterable[Header]) -> bytes:
    metadata: dict[str, str] = {}
    for header in old:
        metadata.update(header.metadata)
    metadata.setdefault("format", "pt")  # transformers refuses files without it
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, info in wanted.items():
        table[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _deal(tensors: Mapping[str, TensorInfo], limit: int) -> dict[str, list[str]]:
    if limit <= 0:
        raise UsageError(f"A shard of at most {limit} bytes holds nothing; give for example --max-shard-size 5GB.")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(
    groups: Mapping[str, list[str]], tensors: Mapping[str, TensorInfo], old: tuple[str, Any] = (INDEX, None)
) -> File:
    name, metadata = old
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(info.nbytes for info in tensors.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(info.numel for info in tensors.values())
    weight_map = {tensor: file for file, names in groups.items() for tensor in names}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return File(safetensors_name(name), (text.encode(),))


def safetensors_name(file: str) -> str:
    """The name under which a weight file of another kind is written: pytorch_model-…​.bin → model-….safetensors."""
    if file.endswith((".safetensors", ".safetensors.index.json")):
        return file
    end = ".index.json" if file.endswith(".index.json") else ""
    stem = file.removesuffix(end).rpartition(".")[0] or file
    return stem.replace("pytorch_model", "model") + ".safetensors" + end
