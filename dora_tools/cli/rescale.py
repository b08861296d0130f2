"""``dora-tools rescale``."""

from __future__ import annotations

from typing import Any

import click

from .options import computing, ranks, reading, writing


@click.command("rescale")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--set-alpha", type=float, metavar="A", help="Write this alpha; lora_B takes what it changes.")
@click.option("--rslora/--no-rslora", default=None, help="Write alpha for rsLoRA's rule, or the classic one.")
@click.option("--dtype", metavar="TYPE", help="Store factors as float32, bfloat16 or float16.")
@click.option("--base", metavar="BASE", help="Measure errors in the weight merged into this model.")
@click.option("--weighted", is_flag=True, help="Truncate by a DoRA's merged weight: rows count m/‖V‖ (with --base).")
@click.option("--refit", is_flag=True, help="Least-squares magnitudes at the new rank (with --base).")
@ranks
@writing
@computing
@reading
def command(adapter: str, base: str | None, set_alpha: float | None, ranks: Any, force: bool, **options: Any) -> Any:
    """Change the rank of ADAPTER (lower: the nearest; higher: padded), or its alpha without changing what it does."""
    from .. import api

    return api.rescale(adapter, base=base, alpha=set_alpha, **ranks, **options)
