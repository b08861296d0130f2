"""Options that several commands share: how to read an adapter that does not say everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

_RULES = ["alpha", "alpha/rank", "rslora", "one"]


def _flags(text: str) -> tuple[str, tuple[bool, ...]]:
    module, _, flags = text.rpartition("=")
    known = {"true": True, "1": True, "false": False, "0": False}
    words = [word.strip().lower() for word in flags.split(",")]
    if not set(words) <= known.keys():
        raise click.UsageError(f"--enable-lora is true or false for each part, as in true,false,true, not '{flags}'.")
    return module, tuple(known[word] for word in words)


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--from`` and what a file may not record; the command gets ``format`` and ``given``."""

    @wraps(command)
    def gathered(
        *args: Any,
        alpha: float | None,
        scaling: float | None,
        scale_rule: str | None,
        magnitude_axis: Any,
        enable_lora: tuple[str, ...],
        saved_in: Any,
        prefix: str,
        **options: Any,
    ) -> Any:
        from ..formats import Given

        flags = dict(_flags(text) for text in enable_lora)
        return command(
            *args, given=Given(alpha, scaling, scale_rule, magnitude_axis, flags, saved_in, prefix), **options
        )

    for option in (
        click.option("--prefix", default="", metavar="PREFIX", help="What stands before the adapted network's names."),
        click.option("--saved-in", type=click.Choice(["train", "eval"]), help="The mode of loralib's layers then."),
        click.option(
            "--enable-lora",
            multiple=True,
            metavar="[MODULE=]FLAGS",
            help="Which parts of a fused layer have factors, e.g. true,false,true or c_attn=1,0,1.",
        ),
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
