"""``dora-tools formats``."""

from __future__ import annotations

import click


@click.command("formats")
@click.argument("table", metavar="[FILE.toml]", required=False)
def command(table: str | None) -> None:
    """List the adapter formats that can be read and written; or check a table of your own, and run its test."""
    from ..formats import formats, named

    listed = list(formats().values()) if table is None else [named(table)]
    for format in listed:
        can = "read, write" if format.write else "read"
        click.echo(f"{format.name:<12} {can:<12} {format.about}")
    if table is not None:
        from ..selftest import check_table

        if not table.endswith(".toml"):
            return
        click.echo("Its [test] gives the expected weights." if check_table(table) else "It has no [test].")
