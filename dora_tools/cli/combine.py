"""``dora-tools combine``."""

from __future__ import annotations

from typing import Any

import click

from .options import computing, ranks, reading, writing


@click.command("combine")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--weight", "weights", type=float, multiple=True, metavar="W", help="Once, or for each adapter.")
@click.option("--base", metavar="BASE", help="The model they were trained on, where DoRA is among them.")
@click.option(
    "--method",
    type=click.Choice(["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]),
    default="linear",
    show_default=True,
    help="How the deltas are summed.",
)
@click.option("--density", type=float, metavar="D", help="The part of each delta that pruning keeps. Default: 0.5.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of what is random.")
@ranks
@writing
@computing
@reading
def command(
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    base: str | None,
    method: str,
    density: float | None,
    seed: int,
    ranks: Any,
    **options: Any,
) -> Any:
    """Make several ADAPTERs one: the exact sum of their updates (ranks add up), or truncated to a rank."""
    from .. import api

    each: Any = weights[0] if len(weights) == 1 else list(weights) or 1.0
    return api.combine(adapters, each, base=base, method=method, density=density, seed=seed, **ranks, **options)
