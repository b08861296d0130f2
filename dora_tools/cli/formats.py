"""``dora-tools formats``."""

from __future__ import annotations

import click


@click.command("formats")
def command() -> None:
    """List the adapter formats that can be read and written."""
    from ..formats import formats

    for format in formats().values():
        can = "read, write" if format.write else "read"
        click.echo(f"{format.name:<12} {can:<12} {format.about}")
