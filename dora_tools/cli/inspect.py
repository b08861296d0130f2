"""``dora-tools inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import reading


@click.command("inspect")
@click.argument("path", metavar="ADAPTER")
@click.option("--base", metavar="BASE", help="Also check that every tensor finds its place in this model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (a versioned schema) instead of a table.")
@click.option("--stats", is_flag=True, help="Read the values too: the size of each module's update.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the updates' sizes as an image.")
@click.option("--suggest-format", is_flag=True, help="Print a starter table (TOML) for a file of unknown format.")
@reading
def command(
    path: str,
    base: str | None,
    format: str | None,
    as_json: bool,
    stats: bool,
    plot: Path | None,
    suggest_format: bool,
    given: Any,
) -> None:
    """Show what is in ADAPTER: its format, base model, ranks, scaling and where it came from, modules, magnitudes.

    Only names and shapes are read, unless --stats or --plot asks for values.
    """
    from .. import api
    from ..summary import Summary

    if suggest_format:
        click.echo(api.suggest_format(path))
        return
    summary = api.inspect(path, base, stats or plot is not None, format, given)
    if plot is not None and isinstance(summary, Summary):
        summary.plot(plot)
    if as_json:
        import json

        click.echo(json.dumps(summary.as_json(), ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for part in summary.table():
        console.print(part)
    if base is not None and isinstance(summary, Summary):
        console.print(f"All {len(summary.modules)} modules have their place in {base}.")
