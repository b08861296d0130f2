"""``dora-tools to-dora``."""

from __future__ import annotations

from typing import Any

import click

from .options import computing, reading, writing


@click.command("to-dora")
@click.argument("adapter", metavar="LORA")
@click.option("--base", metavar="BASE", help="The model it was trained on. Default: the one that it names.")
@click.option("--axis", type=click.Choice(["out", "in"]), default="out", show_default=True, help="One m for each.")
@click.option(
    "--init",
    type=click.Choice(["exact", "paper"]),
    default="exact",
    show_default=True,
    help="m = ‖W + s·BA‖, which keeps the merged weight; or ‖W‖, as the paper starts.",
)
@writing
@computing
@reading
def command(adapter: str, base: str | None, axis: Any, init: Any, force: bool, **options: Any) -> Any:
    """Turn LORA into a DoRA of the same merged weight: a magnitude for each output, to train on or to convert."""
    from .. import api

    return api.to_dora(adapter, base, axis, init, **options)
