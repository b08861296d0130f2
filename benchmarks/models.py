"""Synthetic models of real shapes with a DoRA on all linears, written in row blocks: ``python -m benchmarks.models``.

Run as a process of its own, so that the measuring process stays small.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

HIDDEN, INNER, HEADS, KV_HEADS, RANK = 2048, 5632, 32, 4, 16
_BLOCK = 1 << 20  # elements
_SHARD = 10**9


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor; ``axis`` is that along which a stored matrix that gets a DoRA has its outputs: rows 0, columns 1."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        return 2 * _product(self.shape)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * _product(shape[1:]) if shape else 1


def llama(layers: int) -> tuple[list[Weight], dict[str, Any], dict[str, Any]]:
    """TinyLlama 1.1B at 22 layers: (weights, config.json, what is particular in adapter_config.json)."""
    kv, vocabulary = HIDDEN // HEADS * KV_HEADS, 32000
    weights = [
        Weight("lm_head.weight", (vocabulary, HIDDEN)),
        Weight("model.embed_tokens.weight", (vocabulary, HIDDEN)),
    ]
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}."
        weights += (Weight(f"{start}{name}.weight", shape, 0) for name, shape in shapes.items())
        weights += (Weight(f"{start}{n}_layernorm.weight", (HIDDEN,)) for n in ("input", "post_attention"))
    weights.append(Weight("model.norm.weight", (HIDDEN,)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return weights, config, {"target_modules": sorted(name.rpartition(".")[2] for name in shapes)}


def gpt2(layers: int) -> tuple[list[Weight], dict[str, Any], dict[str, Any]]:
    """About as many bytes as ``llama`` of so many layers, in as much merged as copied; matrices stored (in, out)."""
    count, vocabulary, positions = max(1, round(layers * 19 / 22)), 63000, 1024
    weights = [
        Weight("transformer.wte.weight", (vocabulary, HIDDEN)),
        Weight("transformer.wpe.weight", (positions, HIDDEN)),
    ]
    shapes = {
        "attn.c_attn": (HIDDEN, 3 * HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (HIDDEN, 4 * HIDDEN),
        "mlp.c_proj": (4 * HIDDEN, HIDDEN),
    }
    for layer in range(count):
        start = f"transformer.h.{layer}."
        for name, shape in shapes.items():
            weights += (Weight(f"{start}{name}.weight", shape, 1), Weight(f"{start}{name}.bias", shape[1:]))
        weights += (Weight(f"{start}ln_{n}.{kind}", (HIDDEN,)) for n in (1, 2) for kind in ("weight", "bias"))
    weights += (Weight(f"transformer.ln_f.{kind}", (HIDDEN,)) for kind in ("weight", "bias"))
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": HIDDEN,
        "n_layer": count,
        "n_head": HEADS,
        "n_positions": positions,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return weights, config, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}


SHAPES = {"llama": llama, "gpt2": gpt2}


def _rows(weight: Weight) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, values) of a plausible tensor, block by block."""
    import torch

    width = weight.shape[-1]
    count = _product(weight.shape) // width
    step = max(1, _BLOCK // width)
    for first in range(0, count, step):
        block = torch.empty(min(step, count - first), width)
        yield first, block.normal_(1.0 if "norm" in weight.name or "ln_" in weight.name else 0.0, 0.02)


def build(shape: str, layers: int, single: bool, folder: Path) -> None:
    """Write ``folder``/base and ``folder``/adapter."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights, config, particular = SHAPES[shape](layers)
    base, adapter = folder / "base", folder / "adapter"
    for made in (base, adapter):
        made.mkdir(parents=True)
    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and not single and sum(w.nbytes for w in shards[-1]) + weight.nbytes > _SHARD:
            shards.append([])
        shards[-1].append(weight)
    factors: dict[str, torch.Tensor] = {}
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for weight in shard:
            place[weight.name] = name
            table[weight.name] = {
                "dtype": "BF16",
                "shape": list(weight.shape),
                "data_offsets": [at, at + weight.nbytes],
            }
            at += weight.nbytes
        head = json.dumps(table, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with open(base / name, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for weight in shard:
                squares = torch.zeros(weight.shape[weight.axis]) if weight.axis is not None else None
                for first, block in _rows(weight):
                    rounded = block.bfloat16()
                    file.write(rounded.view(torch.int16).numpy().data)
                    if squares is not None and weight.axis == 0:
                        squares[first : first + len(block)] = rounded.float().square().sum(1)
                    elif squares is not None:
                        squares += rounded.float().square().sum(0)
                if squares is not None:
                    out, in_ = weight.shape if weight.axis == 0 else weight.shape[::-1]
                    start = "base_model.model." + weight.name.removesuffix(".weight")
                    factors[f"{start}.lora_A.weight"] = torch.randn(RANK, in_) * in_**-0.5
                    factors[f"{start}.lora_B.weight"] = torch.randn(out, RANK) * 0.02
                    factors[f"{start}.lora_magnitude_vector"] = squares.sqrt() * (1 + 0.01 * torch.randn(out))
    if len(shards) > 1:
        total = {"total_size": sum(w.nbytes for w in weights)}
        _json(base / "model.safetensors.index.json", {"metadata": total, "weight_map": place})
    _json(base / "config.json", config)
    save_file(factors, adapter / "adapter_model.safetensors")
    kept = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": True,
    }
    _json(adapter / "adapter_config.json", {**kept, **particular})


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@click.command()
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("layers", type=int)
@click.argument("single", type=bool)
@click.argument("folder", type=click.Path(path_type=Path))
def main(shape: str, layers: int, single: bool, folder: Path) -> None:
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    build(shape, layers, single, aside)
    aside.rename(folder)


if __name__ == "__main__":
    main()
