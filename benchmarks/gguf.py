"""``python -m benchmarks gguf``: merges into a real GGUF beside ``cp`` and llama-export-lora, and what each type keeps.

The model is SmolLM2-135M-Instruct in Q4_1 (from PyPI); the adapters are those in fixtures/, which were trained on a
short text. Perplexities are llama.cpp's on the beginning of that text, so that an adapter which was rounded away shows.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

from .measure import PYTHON, Run, clean, facts, run, show

_ROOT = Path(__file__).resolve().parent.parent
_FIXTURES = _ROOT / "fixtures"
_TOOL = [PYTHON, "-m", "dora_tools"]


@click.command("gguf")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "dora-tools-bench",
    show_default=True,
    help="Where the outputs are written.",
)
@click.option("--pairs", type=click.IntRange(1), default=3, show_default=True, help="Runs of each command.")
@click.option("--export-lora", type=click.Path(path_type=Path), help="llama.cpp's llama-export-lora, as a peer.")
@click.option("--tokens", type=click.IntRange(0), default=120, show_default=True, help="For perplexities; 0: none.")
def command(work: Path, pairs: int, export_lora: Path | None, tokens: int) -> None:
    """Time, memory and CPU of merges into a GGUF; parsing; perplexities of what is written in each type."""
    sys.path.insert(0, str(_FIXTURES))
    import real_models

    work.mkdir(parents=True, exist_ok=True)
    facts(work, ("torch", "gguf", "libgguf", "xllamacpp"))
    base, out = real_models.smollm2_gguf(), work / "gguf"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _times(base, out, pairs, export_lora)
    _parsing(out)
    if tokens:
        _perplexities(base, real_models.smollm2("bfloat16"), out, tokens)
    shutil.rmtree(out)


def _times(base: Path, out: Path, pairs: int, export_lora: Path | None) -> None:
    lora = out / "lora.gguf"
    run([*_TOOL, "convert", _FIXTURES / "smollm2-lora", "--to", "gguf", "--like", base, "-o", lora])
    merge: list[str | Path] = [*_TOOL, "merge", "--base", base, "--force", "-o", out / "merged.gguf"]
    commands: dict[str, list[str | Path]] = {
        "import torch": [PYTHON, "-c", "import torch"],
        "cp + sync of the base": ["sh", "-c", f"cp '{base}' '{out}/copy.gguf' && sync '{out}/copy.gguf'"],
        "merge DoRA (210 tensors), Q8_0": [*merge, _FIXTURES / "smollm2-dora"],
        "merge DoRA, f32": [*merge, _FIXTURES / "smollm2-dora", "--gguf-type", "f32"],
        "merge DoRA, q4_k_m": [*merge, _FIXTURES / "smollm2-dora", "--gguf-type", "q4_k_m"],
        "merge LoRA (90 tensors), Q8_0": [*merge, _FIXTURES / "smollm2-lora"],
    }
    if export_lora is not None:
        commands["llama-export-lora, the same LoRA (F16)"] = [
            *(export_lora, "-m", base, "--lora", lora, "-o", out / "exported.gguf", "-t", "2")
        ]
    taken: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(pairs):
        for name, line in commands.items():
            clean(patience=4.0)
            taken[name].append(run(line))
    floor = median(r.rss for r in taken["import torch"])
    show(
        "merges into SmolLM2-135M Q4_1 (98 MB)",
        ("command", "wall s", "CPU s", "peak MB", "above torch"),
        [
            (
                name,
                f"{median(r.wall for r in runs):.2f}",
                f"{median(r.user + r.system for r in runs):.2f}",
                f"{median(r.rss for r in runs) / 1e6:.0f}",
                f"{(median(r.rss for r in runs) - floor) / 1e6:.0f}",
            )
            for name, runs in taken.items()
        ],
    )


def _parsing(out: Path) -> None:
    """The header of a model of 8B's shape, with a vocabulary of 262 k tokens and as many merges."""
    path = out / "8b.gguf"
    _sparse_8b(path)
    script = (
        "import resource, sys, time; from pathlib import Path; from dora_tools.containers import open_checkpoint;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.perf_counter();"
        f"n = len(open_checkpoint(Path({str(path)!r})).tensors); took = time.perf_counter() - start;"
        "print(n, took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    said = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    row = (f"{path.stat().st_size / 1e9:.1f} GB, {said[0]} tensors", f"{float(said[1]):.3f}", f"{float(said[2]):.1f}")
    show("parsing a sparse 8B-shaped file", ("file", "s", "MB"), [row])
    path.unlink()


def _sparse_8b(path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    words = b"".join(text(f"token{number}") for number in range(262144))
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"tokenizer.ggml.{k}") + struct.pack("<IIQ", 9, 8, 262144) + words for k in ("tokens", "merges")]
    shapes = {"token_embd": (4096, 262144), "output": (4096, 262144)}
    for block in range(32):
        widths = {"attn_q": (4096, 4096), "attn_k": (4096, 1024), "attn_v": (4096, 1024), "attn_output": (4096, 4096)}
        widths |= {"ffn_gate": (4096, 14336), "ffn_up": (4096, 14336), "ffn_down": (14336, 4096)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in widths.items()}
    infos, offset = [], 0
    for name, (width, rows) in shapes.items():
        infos.append(text(f"{name}.weight") + struct.pack("<IQQIQ", 2, width, rows, 12, offset))
        offset += width * rows // 256 * 144
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + offset)


def _perplexities(base: Path, model: Path, out: Path, count: int) -> None:
    from make_peft_adapters import LOG
    from tokenizers import Tokenizer

    sys.path.insert(0, str(_ROOT))
    from tests.llamacpp import perplexity

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode("\n".join(LOG)).ids[:count]
    dora = _FIXTURES / "smollm2-dora"
    like: list[str | Path] = ["--like", base]
    wanted: dict[str, list[str | Path]] = {
        "f32, from the HF model (--like)": ["--base", model, *like, "--gguf-type", "f32"],
        "Q8_0 (default), into Q4_1": ["--base", base],
        "q8_0, from the HF model": ["--base", model, *like, "--gguf-type", "q8_0"],
        "q4_k_m, from the HF model": ["--base", model, *like, "--gguf-type", "q4_k_m", "--allow-loss"],
        "q4_k_m, from Q4_1": ["--base", base, "--gguf-type", "q4_k_m", "--allow-loss"],
        "keep (Q4_1 again, --allow-loss)": ["--base", base, "--gguf-type", "keep", "--allow-loss"],
    }
    rows = [("base Q4_1, no adapter", f"{base.stat().st_size / 1e6:.0f}", f"{perplexity(base, ids):.3f}")]
    for name, options in wanted.items():
        path = out / "perplexity.gguf"
        run([*_TOOL, "merge", dora, *options, "-o", path, "--force"])
        rows.append((name, f"{path.stat().st_size / 1e6:.0f}", f"{perplexity(path, ids):.3f}"))
    show(f"perplexity on {count} tokens of the text that the DoRA was trained on", ("file", "MB", "perplexity"), rows)
