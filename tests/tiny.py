"""A hand-made base and adapter, small enough to break in every way: plain arrays, no peft, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Arrays = dict[str, NDArray[Any]]
RANK, ALPHA = 2, 6
MODULES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.1.mlp.up_proj": (12, 8)}


def base_arrays(seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    shapes = {f"{module}.weight": shape for module, shape in MODULES.items()}
    shapes |= {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"model.norm.weight": np.ones(8, np.float32)}


def adapter_arrays(seed: int = 1, dora: bool = True) -> Arrays:
    random = np.random.default_rng(seed)
    arrays: Arrays = {}
    for module, (out, in_) in MODULES.items():
        key = f"base_model.model.{module}."
        arrays[key + "lora_A.weight"] = random.normal(size=(RANK, in_)).astype(np.float32)
        arrays[key + "lora_B.weight"] = random.normal(size=(out, RANK)).astype(np.float32)
        if dora:
            arrays[key + "lora_magnitude_vector"] = random.uniform(1, 2, size=out).astype(np.float32)
    return arrays


def write_base(folder: Path, arrays: Arrays | None = None, shards: int = 1, **config: Any) -> Path:
    """A model directory; more than one shard gets an index."""
    arrays = base_arrays() if arrays is None else arrays
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = dict(list(arrays.items())[i::shards])
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, arrays: Arrays | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": True,
        "base_model_name_or_path": "org/tiny",
        "target_modules": ["q_proj", "up_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter_arrays() if arrays is None else arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def expected(
    base: Mapping[str, NDArray[Any]], adapter: Mapping[str, NDArray[Any]], scaling: float = ALPHA / RANK
) -> Arrays:
    """The merge in float64, from the paper's formula."""
    result = {name: array.astype(np.float64) for name, array in base.items()}
    for module in MODULES:
        key = f"base_model.model.{module}."
        if key + "lora_A.weight" not in adapter:
            continue
        a, b = (adapter[f"{key}lora_{x}.weight"].astype(np.float64) for x in "AB")
        v = result[f"{module}.weight"] + scaling * (b @ a)
        m = adapter.get(key + "lora_magnitude_vector")
        if m is not None:
            v *= (m.astype(np.float64) / np.linalg.norm(v, axis=1))[:, None]
        result[f"{module}.weight"] = v
    return result


def read_model(folder: Path) -> Arrays:
    arrays: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(path)
    return arrays
