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
_LARGEST = 64 << 20  # no tokenizer is that large; what is, is weights under another name
MANIFEST = "dora_tools.json"


def copied(base: Path, config: Mapping[str, Any] | None, dtype: str | None = None) -> list[File]:
    """The small files of a base directory, config.json with ``config`` and the new ``dtype`` in it.

    Weights (also foreign ones: onnx, h5, …), indexes, hidden files, adapters, and an older card stay behind.
    """
    files = []
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix in _WEIGHTS or path.name.endswith(".index.json") or path.stat().st_size > _LARGEST:
            continue
        if relative.as_posix() in {"README.md", "adapter_config.json", MANIFEST} or _STRAY.fullmatch(path.name):
            continue
        data = path.read_bytes()
        if relative.as_posix() == "config.json" and (config is not None or dtype is not None):
            edited = dict(config) if config is not None else json.loads(data)
            if dtype is not None:
                _set_dtype(edited, dtype)
            data = (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()
        files.append(File(relative.as_posix(), (data,)))
    return files


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def card(name: str, base_model: str, adapters: list[str], summary: str) -> File:
    """README.md with the front matter that the Hugging Face hub reads for merged models."""
    listed = "\n".join(f"- {adapter}" for adapter in adapters)
    text = f"""---
base_model:
- {json.dumps(base_model)}
base_model_relation: merge
library_name: transformers
tags:
- dora-tools
- merge
---

# {name}

{base_model} with these adapters merged into its weights by dora-tools:

{listed}

{summary}
"""
    return File("README.md", (text.encode(),))


def manifest(content: Mapping[str, Any]) -> File:
    """dora_tools.json: what was merged into what, so that a result can be traced and checked."""
    stamped = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **content}
    return File(MANIFEST, ((json.dumps(stamped, indent=2, ensure_ascii=False) + "\n").encode(),))
