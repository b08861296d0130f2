"""``dora-tools merge``."""

from __future__ import annotations

import time
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from ..layout import human
from . import printable
from .options import computing, progress, reading

if TYPE_CHECKING:
    from rich.console import Console

    from ..api import MergePlan
    from ..merging import Merged
    from ..storing import Storing


@click.command("merge")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--base", metavar="BASE", help="The model to merge into. Default: the one that the adapter names.")
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="OUT",
    help="Directory to write, or a file if BASE is one (a .gguf file for GGUF).",
)
@click.option(
    "--strength", type=float, multiple=True, metavar="W", help="W' = W + w·(merged − W); once, or per adapter."
)
@click.option(
    "--dtype", metavar="TYPE", help="Write floating weights as float32, bfloat16 or float16. Default: as BASE."
)
@click.option("--max-shard-size", metavar="SIZE", help="Deal the weights out again, e.g. 5GB.")
@click.option("--like", metavar="GGUF", help="A GGUF whose shape to write, of a full-precision BASE.")
@click.option(
    "--gguf-type",
    metavar="TYPE",
    help="How a GGUF stores weights: auto (float as it is, merged quantised ones Q8_0), keep, or all as q8_0, f16, "
    "bf16, f32, q4_k_m, ….",
)
@click.option("--allow-loss", is_flag=True, help="Keep a GGUF although rounding undid the adapter.")
@click.option("--untie", is_flag=True, help="Give a GGUF's head a tensor of its own where only one end was trained.")
@click.option("--modelfile", is_flag=True, help="Write a Modelfile beside the GGUF, for ollama create.")
@click.option("--stats", is_flag=True, help="Measure each tensor's relative change ‖W'−W‖/‖W‖ and print the table.")
@click.option("--dry-run", is_flag=True, help="Check everything, print what would be done, write nothing.")
@click.option(
    "--force", is_flag=True, help="Write into a directory that is not empty, replacing files of the same name."
)
@click.option("--allow-nonfinite", is_flag=True, help="Merge although the adapter or a result holds NaN or Inf.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON (a versioned schema) on stdout.")
@computing
@reading
def command(
    adapters: tuple[str, ...],
    base: str | None,
    out: str,
    strength: tuple[float, ...],
    device: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge ADAPTERs into the weights of BASE: a Hugging Face model, or a GGUF file.

    OUT gets BASE's own files: the same shards, names, order and stored types, with config, tokenizer and index, a card
    and a manifest (dora_tools.json). Of a GGUF, OUT is a .gguf file (or a directory), and what is merged into quantised
    tensors is stored as Q8_0 unless --gguf-type says otherwise. Tensors that the adapters do not touch are copied byte
    for byte.
    """
    from .. import api

    weights: Any = strength[0] if len(strength) == 1 else list(strength) or 1.0
    plan = api.plan_merge(list(adapters), base, out, strength=weights, device=device, **options)
    plan.examine()
    for note in plan.notes:
        click.echo(f"note: {printable(note)}", err=True)
    result, seconds = None, 0.0
    if not dry_run:
        start = time.monotonic()
        with progress("merging", plan.layout.size) as advance:
            result = plan.run(advance)
        seconds = time.monotonic() - start
    if as_json:
        import json

        click.echo(json.dumps(_report(plan, result, dry_run, seconds), ensure_ascii=False))
    else:
        _print(plan, result, dry_run, seconds, options["stats"])


def _print_storing(storing: Storing, console: Console, every: bool) -> None:
    """How the merged weights are stored and what that does to the adapter: together, and with ``every`` each."""
    from rich.table import Table

    rounding, before = storing.rounding, storing.binding.base.tensors
    if rounding is None or not rounding.tensors:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("stored", "tensors", "gain", "error/‖Δ‖", "error/‖W'‖"):
        table.add_column(head, justify="left" if head == "stored" else "right")
    groups: dict[str, list[str]] = {}
    merged = storing.binding.bound
    for name in rounding.tensors:
        label = f"{before[name].dtype} → {storing.dtypes.get(name, before[name].dtype)}"
        groups.setdefault(label if name in merged else f"{label}, not merged", []).append(name)
    rows = [(kinds, str(len(names)), rounding.total(names)) for kinds, names in sorted(groups.items())]
    if len(groups) > 1:
        rows.append(("all merged", str(len(merged)), rounding.total(merged)))
    if every:
        rows += [(name, "", rounded) for name, rounded in rounding.tensors.items()]
    for label, count, r in rows:
        gain, error = ("–" if x is None else f"{x:.3f}" for x in (r.gain, r.error))
        table.add_row(label, count, gain, error, f"{r.relative:.1e}")
    console.print(table)
    for warning in storing.warnings:
        console.print(f"note: {warning}")


def _report(plan: MergePlan, result: Merged | None, dry_run: bool, seconds: float) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": "dora-tools/merge/1",
        "out": str(plan.target),
        "dry_run": dry_run,
        "tensors": {kind: {"count": count, "bytes": size} for kind, (count, size) in plan.counts().items()},
        "bytes": plan.layout.size,
        "files": plan.files,
        "estimated_memory_bytes": plan.memory,
        "free_bytes": plan.free,
        "notes": plan.notes,
    }
    if plan.storing is not None:
        report["gguf"] = plan.storing.report()
    if result is not None:
        report["seconds"] = round(seconds, 3)
        report["rows_without_direction"] = {n: z for n in result.merged if (z := result.zeros(n))}
        if plan.options["stats"]:
            report["relative_change"] = {
                name: r if isfinite(r := result.change(name).relative) else None for name in result.merged
            }
    return report


def _print(plan: MergePlan, result: Merged | None, dry_run: bool, seconds: float, stats: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensors")
    table.add_column("count", justify="right")
    table.add_column("bytes", justify="right")
    for kind, (count, size) in plan.counts().items():
        table.add_row(kind, str(count), human(size))
    console.print(table)
    for item in plan.inputs:
        for scaling in item.scaling():
            console.print(
                f"{item.name}: {scaling['modules']} modules, scaling {scaling['value']:g} = {scaling['source']}"
            )
    if dry_run and plan.storing is not None:
        kinds = plan.storing.planned
        console.print("Stored: " + ", ".join(f"{pair} ({count})" for pair, count in kinds.items()))
    if result is not None and plan.storing is not None:
        _print_storing(plan.storing, console, stats)
    if result is not None and stats:
        changes = {name: result.change(name) for name in result.merged}
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("tensor")
        table.add_column("‖W'−W‖/‖W‖", justify="right")
        for name, change in changes.items():
            table.add_row(name, f"{change.relative:.3e}")
        console.print(table)
    zeros = sum(result.zeros(name) for name in result.merged) if result is not None else 0
    if zeros:
        console.print(f"note: {zeros} rows have no direction (norm 0) and were left as W + s·BA.")
    if dry_run:
        console.print(
            f"Would write {human(plan.layout.size)} in {len(plan.files)} files to {plan.target} "
            f"({human(plan.free)} free), with about {human(plan.memory)} of memory above torch itself."
        )
    else:
        console.print(f"Wrote {human(plan.layout.size)} to {plan.target} in {seconds:.1f} s.")
