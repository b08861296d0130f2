"""Options that several commands share: how to read an adapter that does not say everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

_RULES = ["alpha", "alpha/rank", "rslora", "one"]


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--from`` and what a file may not record; the command gets ``format`` and ``given``."""

    @wraps(command)
    def gathered(
        *args: Any,
        alpha: float | None,
        scaling: float | None,
        scale_rule: str | None,
        magnitude_axis: Any,
        **options: Any,
    ) -> Any:
        from ..formats import Given

        return command(*args, given=Given(alpha, scaling, scale_rule, magnitude_axis), **options)

    for option in (
        click.option("--magnitude-axis", type=click.Choice(["in", "out"]), help="DoRA's m is one for each of these."),
        click.option("--scale-rule", type=click.Choice(_RULES), help="How the trainer scales BA with alpha."),
        click.option("--scaling", type=float, metavar="S", help="The number that BA is multiplied with."),
        click.option("--alpha", type=float, metavar="A", help="Alpha, where the file does not record it."),
        click.option(
            "--from", "--custom", "format", metavar="FORMAT", help="Read as this format, or by the table FILE.toml."
        ),
    ):
        gathered = option(gathered)
    return gathered
