"""``dora-tools convert``."""

from __future__ import annotations

from typing import Any

import click

from . import printable
from .options import reading


@click.command("convert")
@click.argument("adapter", metavar="ADAPTER")
@click.option("-o", "--out", required=True, metavar="OUT", help="Directory (or .gguf file) to write.")
@click.option("--to", required=True, metavar="FORMAT", help="The format to write (see dora-tools formats).")
@click.option("--base", metavar="BASE", help="The model it was trained on, where only that tells a layer's kind.")
@click.option("--like", metavar="GGUF", help="For --to gguf: a GGUF of the base model, which the adapter is to fit.")
@click.option("--arch", metavar="NAME", help="For --to gguf: the architecture, where no model is at hand.")
@click.option(
    "--fold-scaling",
    is_flag=True,
    help="For --to peft: one rank and scaling 1 for all modules, for servers that ignore patterns and rsLoRA.",
)
@click.option(
    "--force", is_flag=True, help="Write into a directory that is not empty, replacing files of the same name."
)
@reading
def command(
    adapter: str,
    out: str,
    to: str,
    base: str | None,
    like: str | None,
    arch: str | None,
    fold_scaling: bool,
    force: bool,
    format: str | None,
    given: Any,
) -> None:
    """Convert ADAPTER to another tool's format, exactly, or refuse and say why."""
    from .. import api

    for note in api.convert(adapter, out, to, format, given, force, base, like, arch, fold_scaling):
        click.echo(f"note: {printable(note)}", err=True)
    click.echo(f"Wrote {to} to {out}.", err=True)
