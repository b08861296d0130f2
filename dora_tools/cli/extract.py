"""``dora-tools extract``."""

from __future__ import annotations

from typing import Any

import click

from .options import computing, ranks, writing


@click.command("extract")
@click.option("--base", required=True, metavar="BASE", help="The model before.")
@click.option("--tuned", required=True, metavar="MODEL", help="The model after.")
@click.option("--dora", is_flag=True, help="Find a DoRA: exact magnitudes, and a direction of low rank.")
@click.option("--save-rest", is_flag=True, help="Keep other tensors that differ whole, as modules_to_save.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the randomised SVD.")
@ranks
@writing
@computing
def command(base: str, tuned: str, ranks: Any, force: bool, **options: Any) -> Any:
    """Find the LoRA (or DoRA) of a given rank or energy that turns BASE into MODEL, and say how near it comes."""
    from .. import api

    return api.extract(base, tuned, **ranks, **options)
