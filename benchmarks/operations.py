"""``python -m benchmarks operations``: rank changes beside a dense SVD, DoRA → LoRA beside PEFT, and what it all takes.

Whole commands on the 2.2 GB model of ``merge`` are measured from outside; the mathematics in a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from .measure import CONSOLE, PYTHON, Run, clean, facts, run, show

_HERE = [PYTHON, "-m", "benchmarks.operations_inside"]
_TOOL = [PYTHON, "-m", "dora_tools"]
_SMOLLM2 = Path(__file__).resolve().parent.parent / "fixtures" / "smollm2-dora"


@click.command("operations")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "dora-tools-bench",
    show_default=True,
    help="Where the models are kept and the outputs written.",
)
@click.option("--size", type=click.IntRange(1), default=22, show_default=True, help="Layers; 22 are 2.2 GB.")
@click.option("--patience", default=8.0, show_default=True, help="Seconds to wait before a run for idle cores.")
def command(work: Path, size: int, patience: float) -> None:
    """Time and memory of to-dora, to-lora, extract and rescale; errors beside PEFT's convert_to_lora."""
    from .merge import _model

    work.mkdir(parents=True, exist_ok=True)
    model = _model("llama", size, False, work)
    facts(work, ("torch", "peft", "transformers"))
    clean(patience=patience)
    floor = run([PYTHON, "-c", "import torch"])
    base, adapter = model / "base", model / "adapter"
    lora, tuned, out = work / "out-lora", work / "out-tuned", work / "out"
    clean(lora, tuned, out)
    run([*_TOOL, "merge", adapter, "--base", base, "-o", tuned])
    commands: dict[str, list[str | Path]] = {
        "to-lora --rank 16": ["to-lora", adapter, "--base", base, "-o", lora, "--rank", "16", "--force"],
        "to-dora": ["to-dora", lora, "--base", base, "-o", out],
        "extract --rank 16": ["extract", "--base", base, "--tuned", tuned, "-o", out, "--rank", "16"],
        "extract --dora --rank 16": ["extract", "--base", base, "--tuned", tuned, "-o", out, "--rank", "16", "--dora"],
        "rescale --rank 8": ["rescale", lora, "-o", out, "--rank", "8"],
    }
    taken: dict[str, Run] = {}
    for name, line in commands.items():
        clean(out, patience=patience)
        taken[name] = run([*_TOOL, *line])
    wide = work / "adapter-7b"
    if not wide.is_dir():
        run([*_HERE, "adapter", wide])
    clean(out, patience=patience)
    taken["rescale --rank 16 of 32 × 7 modules of rank 64"] = run([*_TOOL, "rescale", wide, "-o", out, "--rank", "16"])
    clean(lora, tuned, out)
    rows = [[n, f"{r.wall:.1f}", f"{(r.rss - floor.rss) / 1e6:.0f}", f"{r.others:.1f}"] for n, r in taken.items()]
    show("whole commands; the first four on the 2.2 GB model", ["command", "seconds", "MB above torch", "others"], rows)
    inside: list[list[str | Path]] = [["svd"], ["peft", _SMOLLM2]]
    for what in inside:
        clean(patience=patience)
        report = work / "report.json"
        run([*_HERE, *what, report])
        for line in json.loads(report.read_text()):
            CONSOLE.print(line)
        report.unlink()
