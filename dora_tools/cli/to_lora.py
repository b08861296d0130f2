"""``dora-tools to-lora``."""

from __future__ import annotations

from typing import Any

import click

from .options import computing, ranks, reading, writing


@click.command("to-lora")
@click.argument("adapter", metavar="DORA")
@click.option("--base", metavar="BASE", help="The model it was trained on. Default: the one that it names.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the randomised SVD.")
@ranks
@writing
@computing
@reading
def command(adapter: str, base: str | None, seed: int, ranks: Any, **options: Any) -> Any:
    """Turn DORA into the best plain LoRA of what it really changes, and say how good that is.

    Refused where less than 95 % of the energy of the change is kept, unless --force says that it is meant
    (it also writes into a directory that is not empty).
    """
    from .. import api

    return api.to_lora(adapter, base, seed=seed, **ranks, **options)
