"""Bytes ⇄ Checkpoint and layout. Nothing in here knows of LoRA, save for the file names that tell which is which."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, View
from ..errors import InputError, UsageError
from ..layout import File
from . import gguf, safetensors
from .source import Source

# In order of preference within a directory. A base's own weights come before an adapter that lies beside them.
BASE_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.gguf",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_BESIDE = "non_lora_trainables.bin"  # LLaVA's training scripts: what else was trained, in a file of its own
_DOCUMENTS = {"config": "config.json", "adapter_config": "adapter_config.json"}


def open_checkpoint(path: Path, patterns: Iterable[str] = (*ADAPTER_FILES, *BASE_FILES)) -> Checkpoint:
    """The tensors of a file, or of a directory's weights: the first of ``patterns`` that is there.

    ``metadata`` also gets the directory's ``config`` and ``adapter_config``. Raises InputError for what is not there,
    not readable, or ambiguous.
    """
    if path.is_dir():
        from . import dcp

        if dcp.is_dcp(path):
            return _joined([dcp.open_dcp(path)], _documents(path))
        return _with_trained(_choose(path, patterns))
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    return _with_trained(path)


def _with_trained(path: Path) -> Checkpoint:
    """A file; of an adapter also what its training wrote beside it."""
    beside = path.parent / TRAINED_BESIDE
    if path.name not in ADAPTER_FILES or not beside.exists():
        return _open_file(path, path.parent)
    return _joined([_open_file(file, path.parent) for file in (path, beside)], _documents(path.parent))


def _choose(folder: Path, patterns: Iterable[str]) -> Path:
    for pattern in patterns:
        found = sorted(p for p in folder.glob(pattern) if p.name not in ADAPTER_FILES or pattern in ADAPTER_FILES)
        found = gguf.models(found) if pattern.endswith(".gguf") else found
        if len(found) == 1:
            other = folder / pattern.removesuffix(".index.json")
            if pattern.endswith(".index.json") and other.is_file() and "*" not in pattern:
                raise InputError(
                    f"{folder} holds both {found[0].name} and {other.name}: which is stale? Name the right one."
                )
            return found[0]
        if found:
            raise InputError(
                f"{folder} holds several checkpoints ({', '.join(p.name for p in found[:4])}) and no "
                "model.safetensors.index.json that says which belong together; name one file."
            )
    if any((folder / name).exists() for name in ADAPTER_FILES) and patterns is BASE_FILES:
        raise InputError(f"{folder} is an adapter; a base is a model's own weights.")
    here = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise InputError(f"{folder} holds no weights that can be read (looked for {', '.join(patterns)}; there is {here}).")


def _open_file(path: Path, folder: Path) -> Checkpoint:
    documents = _documents(folder)
    if path.name.endswith(".bin.index.json"):
        from .torch_pickle import open_torch

        table = safetensors.read_index(path)
        parts = [open_torch(shard) for shard in safetensors.shard_paths(path, table["weight_map"])]
        there = {name for part in parts for name in (*part.tensors, *part.metadata.get("opaque", {}))}
        absent = [name for name in table["weight_map"] if name not in there]
        if absent:
            raise InputError(f"{path.name} lists {len(absent)} tensors that no shard holds (first: {absent[0]}).")
        return _joined(parts, {**documents, "index": (path.name, table.get("metadata"))})
    if path.name.endswith(".index.json"):
        return safetensors.open_index(path, documents)
    Source(path)  # raises for a pipe or a device before anything waits for it
    if gguf.is_gguf(path):
        return gguf.open_gguf(path, documents)
    if _is_pickle(path):
        from .torch_pickle import open_torch

        return _joined([open_torch(path)], documents)
    return safetensors.SafetensorsCheckpoint([path], documents)


def lay_out(
    checkpoint: Checkpoint,
    *,
    dtypes: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    file: str | None = None,
    file_type: int | None = None,
) -> list[File]:
    """The weight files of an output, in the container that its base has: GGUF, or else safetensors.

    ``dtypes``: tensors that change their stored type. ``max_shard_size``: bytes of a file, for safetensors.
    ``file``: the name of the one file. ``file_type``: what a GGUF calls its mix of types.
    """
    if "gguf_values" in checkpoint.metadata:
        return [gguf.lay_out_new(checkpoint, checkpoint.metadata["gguf_values"], file or "model.gguf")]
    if "gguf" not in checkpoint.metadata:
        return safetensors.lay_out(checkpoint, dtypes=dtypes, max_shard_size=max_shard_size, file=file)
    if max_shard_size is not None:
        raise UsageError("GGUF files are not dealt out into shards; leave --max-shard-size out (gguf-split splits).")
    return gguf.lay_out(checkpoint, dtypes=dtypes, file=file, file_type=file_type)


def _is_pickle(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    return head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04") or path.suffix in {".bin", ".pt", ".pth", ".ckpt"}


def _joined(parts: Iterable[Checkpoint], documents: Mapping[str, Any]) -> Checkpoint:
    """Several checkpoints as one."""
    parts = list(parts)
    twice = [name for i, part in enumerate(parts) for name in part.tensors if any(name in p.tensors for p in parts[:i])]
    if twice:
        raise InputError(f"{len(twice)} tensors are in two of the files (first: {twice[0]}); which one counts?")
    sources = {name: (part, name) for part in parts for name in part.tensors}
    metadata: dict[str, Any] = {key: value for part in parts for key, value in part.metadata.items()}
    metadata["opaque"] = {key: value for part in parts for key, value in part.metadata.get("opaque", {}).items()}
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    return View(sources, tensors, metadata | dict(documents))


def _documents(folder: Path) -> dict[str, Any]:
    return {key: _document(folder / name) for key, name in _DOCUMENTS.items() if (folder / name).is_file()}


def _document(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=safetensors.unique)
    except (OSError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} where a JSON object is expected.")
    return value
