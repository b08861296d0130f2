"""What a model directory holds besides its weights, as bytes: small files copied, config edited, card, manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .layout import File

_WEIGHTS = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".onnx",
        ".onnx_data",
        ".h5",
        ".msgpack",
        ".tflite",
        ".pb",
        ".npz",
        ".pkl",
        ".ot",
        ".mlmodel",
        ".distcp",
        ".engine",
        ".xml",
        ".part",
    ]
)
# what training leaves behind in a model's directory
_STRAY = re.compile(
    r".*\.log|events\.out\.tfevents.*|train(er|ing)_.*|.*_results\.json|optimizer.*|scheduler.*|rng_state.*"
)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_LARGEST = 64 << 20  # no tokenizer is that large; what is, is weights under another name
MANIFEST = "dora_tools.json"


def copied(
    base: Path, config: Mapping[str, Any] | None, dtype: str | None = None, tokenizer: Path | None = None
) -> list[File]:
    """The small files of a base directory, config.json with ``config`` and the new ``dtype`` in it.

    Weights (also foreign ones: onnx, h5, …), indexes, hidden files, what training leaves behind, adapters and an older
    card stay. A directory given as ``tokenizer`` brings its own tokenizer files instead of the base's.
    """
    files, home = {}, base.resolve()
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if not any(path.resolve().is_relative_to(place) for place in (home, home.parent.parent / "blobs")):
            continue  # a link to somewhere else
        if path.suffix in _WEIGHTS or path.name.endswith(".index.json") or path.stat().st_size > _LARGEST:
            continue
        if relative.as_posix() in {"README.md", "adapter_config.json", MANIFEST} or _STRAY.fullmatch(path.name):
            continue
        if tokenizer is not None and relative.as_posix() in _TOKENIZER:
            continue
        files[relative.as_posix()] = path.read_bytes()
    if tokenizer is not None:
        files |= {name: (tokenizer / name).read_bytes() for name in _TOKENIZER if (tokenizer / name).is_file()}
    if config and (dtype is not None or json.loads(files.get("config.json", b"{}")) != config):
        edited = dict(config)
        if dtype is not None:
            _set_dtype(edited, dtype)
        files["config.json"] = as_json(edited)
    return [File(name, (data,)) for name, data in sorted(files.items())]


def as_json(value: Mapping[str, Any]) -> bytes:
    """For people and machines: UTF-8 as it is, half characters and numbers that JSON does not have made harmless."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2) + "\n").encode()


def tokenizer_in(folder: Path | None) -> bool:
    """Whether a directory holds a tokenizer as it was saved, with its settings."""
    return folder is not None and (folder / "tokenizer_config.json").is_file()


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def card(name: str, base_model: str, hub_id: str | None, adapters: list[str], summary: str, gguf: bool = False) -> File:
    """README.md with the front matter that the Hugging Face hub reads, if the base has a ``hub_id`` to name there."""
    listed = "\n".join(f"- {adapter}" for adapter in adapters)
    relation = f"base_model:\n- {json.dumps(hub_id)}\nbase_model_relation: merge\n" if hub_id else ""
    text = f"""---
{relation}library_name: {"gguf" if gguf else "transformers"}
tags:
- dora-tools
- merge
---

# {name}

{base_model} with these adapters merged into its weights by dora-tools:

{listed}

{summary}
"""
    return File("README.md", (text.encode(errors="replace"),))


def manifest(content: Mapping[str, Any]) -> File:
    """dora_tools.json: what was merged into what, so that a result can be traced and checked."""
    stamped = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **content}
    return File(MANIFEST, (as_json(stamped),))
