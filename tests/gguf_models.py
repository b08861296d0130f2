"""What the GGUF tests share: files read and written by the gguf package, and merges computed by hand in float64.

Nothing here uses dora_tools. Files are read with ``GGUFReader`` and written with ``GGUFWriter``; names come from the
package's own tensor name map, row orders from llama.cpp's converter as the reference describes it, scalings from
PEFT's rules. ``converted`` must give base.gguf itself from the Hugging Face weights, which a test asserts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

GGUF = Path(__file__).parent.parent / "fixtures" / "gguf"
Floats = NDArray[np.float64]
Weights = dict[str, Floats]
FAMILIES = sorted(path.parent.name for path in GGUF.glob("*/expected.npz"))
ADAPTERS = sorted((path.parent.parent.name, path.parent.name) for path in GGUF.glob("*/*/adapter_config.json"))
PERMUTED = ("llama", "granite", "smollm3")  # GGUF architectures of the fixtures whose q and k rows interleave
CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
# Types that llama.cpp computes with; float64 loads and then crashes it.
RUNNABLE = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}

# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: the name of its type, its shape with the row length last, and its bytes."""

    kind: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def values(self) -> Floats:
        kind = GGMLQuantizationType[self.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self.raw, np.uint8).reshape(-1, self.shape[-1] // block * size)
        if self.kind in ("F32", "F16"):
            return (
                np.frombuffer(self.raw, {"F32": "<f4", "F16": "<f2"}[self.kind]).astype(np.float64).reshape(self.shape)
            )
        decoded: Floats = quants.dequantize(raw, kind).astype(np.float64).reshape(self.shape)
        return decoded


@dataclass(frozen=True)
class Read:
    """A whole file: ``kv`` are the bytes of its metadata."""

    tensors: dict[str, Stored]
    kv: bytes
    fields: dict[str, Any]
    offsets: dict[str, int]

    @property
    def values(self) -> Weights:
        return {name: stored.values for name, stored in self.tensors.items()}

    @property
    def types(self) -> dict[str, str]:
        return {name: stored.kind for name, stored in self.tensors.items()}


def read(path: Path) -> Read:
    reader = GGUFReader(path)
    tensors = {
        t.name: Stored(t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), t.data.tobytes())
        for t in reader.tensors
    }
    with path.open("rb") as file:
        head = file.read(int(reader.tensors[0].field.offset))[24:]
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return Read(tensors, head, fields, {t.name: int(t.data_offset) for t in reader.tensors})


def copy_values(
    reader: GGUFReader, writer: GGUFWriter, skip: Collection[str] = (), rename: tuple[str, str] = ("", "")
) -> None:
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in {"general.architecture", *skip}:
            kind = field.types[0]
            item = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key.replace(*rename, 1), field.contents(), kind, item)


def rewrite(
    source: Path,
    target: Path,
    tensors: Mapping[str, Floats] | None = None,
    types: Mapping[str, str] | Callable[[str, Floats], str] | None = None,
    alignment: int | None = None,
    values: Mapping[str, Any] | None = None,
) -> Path:
    """The file ``source`` with other tensors, types or metadata, written by GGUFWriter."""
    reader, before, values = GGUFReader(source), read(source), dict(values or {})
    old = before.fields["general.architecture"]
    architecture = values.pop("general.architecture", old)
    writer = GGUFWriter(target, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    copy_values(reader, writer, values, (f"{old}.", f"{architecture}."))
    for key, value in values.items():
        {list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, array in (before.values if tensors is None else tensors).items():
        kept = before.types.get(name, "F32")
        kind = types(name, array) if callable(types) else (types or {}).get(name, kept)
        data = quants.quantize(array.astype(np.float32), GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def matrices_as(kind: str) -> Callable[[str, Floats], str]:
    """For ``rewrite``: matrices in this type, vectors in float32."""
    return lambda name, array: kind if array.ndim > 1 else "F32"


# --- the converter by hand -------------------------------------------------------------------------------------------


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's row order of q and k (reference §5.2, the tensor form)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separated(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The Hugging Face order, from llama.cpp's."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Family:
    """A fixture's folder and how its Hugging Face tensors become those of its GGUF."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    @property
    def base(self) -> Path:
        return self.folder / "base.gguf"

    @property
    def gelu(self) -> bool:
        return (self.folder / "expected-gelu16.npz").is_file()

    def expected(self, exact: bool = True) -> Mapping[str, NDArray[Any]]:
        """PEFT's logits; or, not ``exact``, with llama.cpp's GELU, where the model has one."""
        loaded: Mapping[str, NDArray[Any]] = np.load(
            self.folder / ("expected-gelu16.npz" if self.gelu and not exact else "expected.npz")
        )
        return loaded

    @property
    def tokens(self) -> list[list[int]]:
        tokens: list[list[int]] = self.expected()["tokens"].tolist()
        return tokens

    @property
    def architecture(self) -> str:
        kind = str(self.config["model_type"])
        return {"mixtral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "qwen3_moe": "qwen3moe"}.get(kind, kind)

    @property
    def permutes(self) -> bool:
        return self.architecture in PERMUTED

    @property
    def weights(self) -> Weights:
        """The Hugging Face weights."""
        return {name: t.double().numpy() for name, t in load_file(self.folder / "model.safetensors").items()}

    def place(self, name: str) -> tuple[str, int]:
        """The GGUF name of a Hugging Face tensor, and which expert of a stack it is (-1: none)."""
        architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture)
        names = gguf.get_tensor_name_map(architecture, 2)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        found: str | None = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found, int(expert[1]) if expert else -1

    def transformed(self, name: str, tensor: Floats, permute: bool = True) -> Floats:
        """A Hugging Face tensor as it stands under the GGUF ``name``."""
        parts = name.split(".")
        leaf, config = parts[-2], self.config
        if permute and self.permutes and leaf in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
            return interleaved(tensor, heads)
        if self.architecture == "gpt2" and leaf in CONV1D and tensor.ndim == 2:
            return tensor.T
        if self.architecture.startswith("gemma") and leaf.endswith("norm"):
            return tensor + 1
        return tensor

    def converted(self, weights: Mapping[str, Floats], permute: bool = True) -> Weights:
        """All tensors of the GGUF file, from the Hugging Face weights."""
        found: Weights = {}
        stacks: dict[str, dict[int, Floats]] = {}
        for source, tensor in weights.items():
            name, expert = self.place(source)
            if expert < 0:
                found[name] = self.transformed(name, tensor, permute)
            else:
                stacks.setdefault(name, {})[expert] = tensor
        return found | {name: np.stack([s[e] for e in range(len(s))]) for name, s in stacks.items()}

    def back(self, values: Mapping[str, Floats]) -> Weights:
        """Hugging Face weights from the tensors of a GGUF file."""
        shift = 1 if self.architecture.startswith("gemma") else 0
        found: Weights = {}
        for name in self.weights:
            place, expert = self.place(name)
            array, leaf = values[place], place.split(".")[-2]
            if expert >= 0:
                array = array[expert]
            elif self.permutes and leaf in ("attn_q", "attn_k"):
                heads = self.config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
                array = separated(array, heads)
            elif leaf.endswith("norm"):
                array = array - shift
            elif self.architecture == "gpt2":
                array = self.transformed(place, array)
            found[name] = array
        return found


def family(name: str) -> Family:
    return Family(GGUF / name)


# --- adapters by hand ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """One adapted module: its scaling, A (r, in), B (out, r) and magnitude; ``embedding``: the update is (BA)ᵀ."""

    scaling: float
    a: Floats
    b: Floats
    m: Floats | None = None
    embedding: bool = False


@dataclass(frozen=True)
class AdapterByHand:
    modules: dict[str, Module]
    saved: Weights


def setting(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """A rank or alpha of a module: that of the first pattern which its name ends with (PEFT's rule)."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def by_hand(folder: Path) -> AdapterByHand:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name.removeprefix("base_model.model."): t.double().numpy()
        for name, t in load_file(folder / "adapter_model.safetensors").items()
    }
    modules, saved, used = {}, {}, set()
    for name, a in tensors.items():
        for half, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if not name.endswith(half):
                continue
            module = name.removesuffix(half)
            rank = setting(config, "rank_pattern", module, config["r"])
            alpha = setting(config, "alpha_pattern", module, config["lora_alpha"])
            scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
            magnitude = module + ".lora_magnitude_vector"
            m = tensors.get(magnitude)
            assert rank == a.shape[0]
            modules[module] = Module(scaling, a, tensors[module + other], m, "embedding" in half)
            used |= {name, module + other, magnitude}
    for name, tensor in tensors.items():
        if name not in used:
            saved[name.replace(".base_layer", "")] = tensor
    return AdapterByHand(modules, saved)


def merged_by_hand(weights: Mapping[str, Floats], adapter: AdapterByHand, conv1d: bool, strength: float = 1) -> Weights:
    """W' = W + strength·(m/‖V‖ V − W), V = W + s·BA, in float64, of Hugging Face weights."""
    result = dict(weights)
    for name, tensor in adapter.saved.items():
        own = name if name in result else name.replace("lm_head", "model.embed_tokens")
        result[own] = result[own] + strength * (tensor - result[own])
    for module, update in adapter.modules.items():
        name = f"{module}.weight"
        before = result.get(name, result.get("model.embed_tokens.weight"))
        assert before is not None
        w = before.T if conv1d else before
        product = update.b @ update.a
        v = w + update.scaling * (product.T if update.embedding else product)
        if update.m is not None:
            v = v * (update.m / np.linalg.norm(v, axis=1))[:, None]
        after = w + strength * (v - w)
        result[name] = after.T if conv1d else after
    return result


def assert_close(found: Floats, want: Floats, name: str, bar: float = 1e-6) -> None:
    """Every value within ``bar`` of the largest of its row."""
    assert found.shape == want.shape, name
    largest = np.abs(want).max(-1, keepdims=True)
    worst = float((np.abs(found - want) / np.where(largest > 0, largest, 1)).max())
    assert worst <= bar, f"{name}: off by {worst:.2g} of the row's largest"


def edited_adapter(
    source: Path, target: Path, edit: Callable[[str, torch.Tensor], torch.Tensor | None], **config: Any
) -> Path:
    """A copy of an adapter with other tensors (None: left out) and settings."""
    target.mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", target)
    settings = json.loads((target / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {n: edit(n, t) for n, t in load_file(source / "adapter_model.safetensors").items()}
    kept = {n: t.contiguous() for n, t in tensors.items() if t is not None}
    save_file(kept, target / "adapter_model.safetensors", {"format": "pt"})
    return target
