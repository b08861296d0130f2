"""``python -m benchmarks merge``: a whole merge beside a copy of the same files to the same disk, in pairs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import click

from .measure import CONSOLE, PYTHON, Run, clean, facts, run, show, spread, warm

IMPORT, OURS, COPY, PEFT = "import torch", "dora-tools merge", "cp + sync", "PEFT"


@click.command("merge")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "dora-tools-bench",
    show_default=True,
    help="Where the models are kept and the outputs written: the disk that is measured.",
)
@click.option("--shards", type=click.Choice(["1GB", "single"]), default="1GB", show_default=True)
@click.option("--size", type=click.IntRange(1), default=22, show_default=True, help="Layers; 22 are 2.2 GB.")
@click.option(
    "--axis",
    type=click.Choice(["out", "in"]),
    default="out",
    show_default=True,
    help="in: also a GPT-2 of that size, whose matrices are stored (in, out), so that norms run down columns.",
)
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--peft", is_flag=True, help="PEFT too, once.")
@click.option("--patience", default=8.0, show_default=True, help="Seconds to wait before a run for idle cores.")
@click.option("--threads", type=click.IntRange(1), help="As of dora-tools merge.")
def command(
    work: Path, shards: str, size: int, axis: str, pairs: int, peft: bool, patience: float, threads: int | None
) -> None:
    """Merge a rank-16 DoRA on all linears of a bf16 model, beside cp + sync of the same files."""
    work.mkdir(parents=True, exist_ok=True)
    single = shards == "single"
    model = _model("llama", size, single, work)
    other = _model("gpt2", size, single, work) if axis == "in" else None
    facts(work, ("torch", "safetensors", "peft", "transformers"))
    more = () if threads is None else ("--threads", str(threads))
    out, turned = f"{OURS}", f"{OURS}, in-axis"
    runs: dict[str, list[Run]] = {IMPORT: [], out: [], **({turned: []} if other else {}), COPY: []}
    for used in filter(None, (model, other)):
        warm(used)
    for number in range(pairs):
        todo = list(runs)[1:]
        if number % 2:
            todo.reverse()
        clean(work / "out", patience=patience)
        runs[IMPORT].append(run([PYTHON, "-c", "import torch"]))
        for name in todo:
            target = work / "out"
            clean(target, patience=patience)
            place = other if name == turned and other else model
            runs[name].append(_copy(place, target) if name == COPY else _merge(place, target, more))
            _check(place, target)
    with_peft = _peft(model, work) if peft else None
    clean(work / "out")

    sizes = {IMPORT: 0, out: _size(model), turned: _size(other) if other else 0, COPY: _size(model)}
    rows = []
    for name, taken in runs.items():
        rate = sizes[name] / median(r.wall for r in taken) / 1e9
        cpu = (median(r.user for r in taken), median(r.system for r in taken))
        peak = max(r.rss for r in taken) / 1e6
        others = f"{median(r.others for r in taken):.1f}"
        seconds = [*spread([r.wall for r in taken]), *(f"{c:.2f}" for c in cpu)]
        rows.append([name, *seconds, others, f"{peak:.0f}", f"{rate:.2f}"])
    columns = ["seconds", "min", "median", "max", "user", "system", "cores by others", "peak MB", "GB/s"]
    show(f"{sizes[out] / 1e9:.2f} GB bf16, {shards} shards, {pairs} pairs", columns, rows)

    lines = []
    for name in (out, turned) if other else (out,):
        scale = sizes[COPY] / sizes[name]
        own = [r.wall - i.wall for r, i in zip(runs[name], runs[IMPORT], strict=True)]
        ratios = [scale * o / c.wall for o, c in zip(own, runs[COPY], strict=True)]
        lines.append([f"({name} − {IMPORT}) / {COPY}", *spread(ratios), " ".join(f"{r:.2f}" for r in ratios)])
    if other:
        scale = sizes[out] / sizes[turned]
        ratios = [
            scale * (t.wall - i.wall) / (o.wall - i.wall)
            for t, o, i in zip(runs[turned], runs[out], runs[IMPORT], strict=True)
        ]
        lines.append(["in-axis / out-axis, each − import torch", *spread(ratios), " ".join(f"{r:.2f}" for r in ratios)])
    show("paired ratios, per byte", ["ratio", "min", "median", "max", "each"], lines)
    floor = median(r.rss for r in runs[IMPORT])
    for name in (out, turned) if other else (out,):
        CONSOLE.print(f"peak RSS of {name} above {IMPORT}: {(max(r.rss for r in runs[name]) - floor) / 1e6:.0f} MB")
    if with_peft is not None:
        ratio = with_peft.wall / median(r.wall for r in runs[out])
        CONSOLE.print(
            f"PEFT load, merge, save: {with_peft.wall:.1f} s ({with_peft.user:.1f} user, {with_peft.system:.1f} "
            f"system), peak RSS {with_peft.rss / 1e6:.0f} MB, {ratio:.1f} × the time of {OURS}"
        )


def _model(shape: str, layers: int, single: bool, work: Path) -> Path:
    """The folder with base/ and adapter/, built where it is not there yet."""
    folder = work / f"{shape}-{layers}-{'single' if single else 'sharded'}"
    if not folder.is_dir():
        CONSOLE.print(f"building {folder}")
        run([PYTHON, "-m", "benchmarks.models", shape, str(layers), str(int(single)), folder])
    return folder


def _merge(model: Path, out: Path, more: tuple[str, ...]) -> Run:
    merge: list[str | Path] = [
        PYTHON,
        "-m",
        "dora_tools",
        "merge",
        model / "adapter",
        "--base",
        model / "base",
        "-o",
        out,
        *more,
    ]
    return run(merge)


def _copy(model: Path, out: Path) -> Run:
    script = 'cp -r --reflink=never "$1" "$2" && sync "$2"/*'
    return run(["sh", "-c", script, "sh", model / "base", out])


def _peft(model: Path, work: Path) -> Run:
    clean(work / "out")
    return run([PYTHON, "-m", "benchmarks.peft_merge", model / "base", model / "adapter", work / "out"])


def _check(model: Path, out: Path) -> None:
    for path in (model / "base").glob("*.safetensors"):
        assert (out / path.name).stat().st_size == path.stat().st_size, f"{out / path.name} is not complete"


def _size(model: Path) -> int:
    return sum(path.stat().st_size for path in (model / "base").iterdir())
