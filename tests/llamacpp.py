"""llama.cpp as an oracle: the log-probabilities that it computes from a GGUF file, with or without LoRA adapters.

It comes from the xllamacpp wheel and runs in a child process, since it aborts on some files (an adapter of
``token_embd.weight`` on a tied model, tensors in float64), through that wheel's public ``Server`` alone. Everything
that costs accuracy is off: the KV cache is float32, flash attention and repacked weights are disabled. What remains
against transformers in float32 is an NMSE of about 1e-12 on a float32 file; on a quantised file llama.cpp quantises
activations too, which alone is an NMSE of 1e-3.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
EVERYTHING = 1 << 22  # asks for the log-probabilities of that many tokens; llama.cpp cuts it to the vocabulary
TIMEOUT = 300  # seconds for one child
UNDERFLOW = -1e30  # llama.cpp says -3.4e38 for the logarithm of a float32 probability of zero


def available() -> bool:
    """Whether the xllamacpp wheel is installed."""
    return find_spec("xllamacpp") is not None


def log_probabilities(model: Path, tokens: Sequence[Sequence[int]], lora: Iterable[tuple[Path, float]] = ()) -> Floats:
    """The log-probabilities of the token after each prompt, (prompt, token id), summing to one in float64.

    Prompts are token ids and are used as they are: nothing is put in front of them. ``lora`` are adapter files with
    the factors that llama.cpp is told to apply them with. A file that llama.cpp refuses, or dies of, is a
    RuntimeError that quotes what llama.cpp said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npy"
        order = {
            "model": str(model),
            "tokens": [[int(token) for token in prompt] for prompt in tokens],
            "lora": [(str(path), float(scale)) for path, scale in lora],
            "out": str(out),
        }
        done = subprocess.run(
            [sys.executable, "-P", __file__], input=json.dumps(order), capture_output=True, text=True, timeout=TIMEOUT,
            errors="replace",
        )  # fmt: skip
        if done.returncode or not out.is_file():
            said = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}".strip()
            raise RuntimeError(f"llama.cpp left with {done.returncode} on {model}:\n{said}")
        found: Floats = np.load(out)
    return normalised(found)


def normalised(logits: ArrayLike) -> Floats:
    """Log-probabilities from logits, or from log-probabilities that are off by a constant, over the last axis."""
    values = np.asarray(logits, np.float64)
    values = values - values.max(-1, keepdims=True)
    result: Floats = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result


def nmse(x: ArrayLike, y: ArrayLike) -> float:
    """‖x − y‖² / ‖y‖², each prompt's row centred first.

    Log-probabilities are logits minus a constant per prompt, which the centring removes: logits and log-probabilities
    may be mixed, and the result is that of logits whose mean over the vocabulary is zero.
    """
    centred = [np.asarray(z, np.float64) - np.asarray(z, np.float64).mean(-1, keepdims=True) for z in (x, y)]
    return float(((centred[0] - centred[1]) ** 2).sum() / (centred[1] ** 2).sum())


def perplexity(model: Path, tokens: Sequence[int], lora: Iterable[tuple[Path, float]] = ()) -> float:
    """Over all tokens but the first, each predicted from all before it: one request each, so for short texts only."""
    prefixes = [tokens[:end] for end in range(1, len(tokens))]
    found = log_probabilities(model, prefixes, lora)
    return float(np.exp(-np.mean(found[np.arange(len(prefixes)), list(tokens[1:])])))


def _run(order: dict[str, Any]) -> Floats:
    """What the child does: loads the model, asks for each prompt, returns what llama.cpp says by token id."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = order["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in order["lora"]]
    params.n_ctx = max(256, 8 + max(map(len, order["tokens"])))
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # two spin, for seconds on busy cores
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True
    params.warmup = params.fit_params = params.cache_prompt = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    rows = []
    for prompt in order["tokens"]:
        reply = server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": EVERYTHING, "cache_prompt": False}
        )
        if "choices" not in reply:
            raise RuntimeError(f"no answer: {reply}")
        assert reply["usage"]["prompt_tokens"] == len(prompt), "llama.cpp changed the prompt"
        (said,) = reply["choices"][0]["logprobs"]["content"]
        # By id: the texts of different tokens may be equal, or no text at all.
        by_id = {item["id"]: item["logprob"] for item in said["top_logprobs"]}
        row = np.array([by_id.get(token, np.nan) for token in range(len(said["top_logprobs"]))])
        assert np.isfinite(row).all(), "llama.cpp left tokens out, or computed NaN"
        assert (row > UNDERFLOW).all(), "logits too far apart: a probability is zero in float32"
        rows.append(row)
    return np.array(rows)


if __name__ == "__main__":
    task = json.load(sys.stdin)
    np.save(task["out"], _run(task))
