"""Options that several commands share: how to read an adapter, where to compute, which ranks, what to write."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from ..layout import human
from . import printable

if TYPE_CHECKING:
    from ..operations.outcome import Outcome

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
        fan_in_fan_out: bool | None,
        peft_version: str | None,
        lora_b_layout: str | None,
        expert_lora_a: Any,
        mha_out_proj: Any,
        residual_base: bool,
        initial_adapter: str | None,
        **options: Any,
    ) -> Any:
        from ..formats import Given
        from ..opening import initial

        flags = dict(_flags(text) for text in enable_lora)
        if len(flags) < len(enable_lora):
            raise click.UsageError("--enable-lora says two things of the same layers.")
        return command(
            *args,
            given=Given(
                alpha,
                scaling,
                scale_rule,
                magnitude_axis,
                flags,
                saved_in,
                fan_in_fan_out,
                prefix,
                peft_version=peft_version,
                lora_b_layout=lora_b_layout,
                expert_lora_a=expert_lora_a,
                mha_out_proj=mha_out_proj,
                residual_base=residual_base,
                initial=initial(initial_adapter) if initial_adapter else None,
            ),
            **options,
        )

    for option in (
        click.option(
            "--initial-adapter",
            metavar="ADAPTER",
            help="PEFT's adapter as it was before training, for one that began as a part of the base weights.",
        ),
        click.option(
            "--residual-base",
            is_flag=True,
            help="BASE is what PiSSA, LoftQ and their like had left of the model when training began.",
        ),
        click.option(
            "--mha-out-proj",
            type=click.Choice(["once", "twice"]),
            help="How often to merge the out_proj of nn.MultiheadAttention. Default: as PEFT trained it.",
        ),
        click.option(
            "--lora-b-layout",
            type=click.Choice(["rank_major", "grouped_by_expert"]),
            help="The order of lora_B's columns for experts, where the file does not tell (Unsloth).",
        ),
        click.option(
            "--expert-lora-a",
            type=click.Choice(["first", "last"]),
            help="Which axis of the experts' matrices lora_A is of, where they are square and the file does not tell.",
        ),
        click.option("--peft-version", metavar="V", help="The PEFT that wrote the adapter, where it does not say."),
        click.option("--prefix", default="", metavar="PREFIX", help="What stands before the adapted network's names."),
        click.option(
            "--fan-in-fan-out/--no-fan-in-fan-out",
            default=None,
            help="Whether the base stores square weights of the adapted layers as (in, out).",
        ),
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


def computing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--device`` and ``--threads``; the command gets a device that torch knows."""

    @wraps(command)
    def gathered(*args: Any, device: str, **options: Any) -> Any:
        if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", device):
            raise click.UsageError(f"'{device}' is no device; use cpu, cuda, cuda:1 or auto.")
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        return command(*args, device=device, **options)

    threads = "Worker threads. Default: one for each core, at most 8."
    for option in (
        click.option("--threads", type=click.IntRange(1, 64), help=threads),
        click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda, cuda:1 or auto."),
    ):
        gathered = option(gathered)
    return gathered


_COUNTS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def _count(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMGB]?)", text.strip().upper())
    if match is None:
        raise click.BadParameter(f"'{text}' is no number of parameters; write 500000 or 20M.")
    return int(float(match[1]) * _COUNTS.get(match[2], 1))


def ranks(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the ways to say a rank; the command gets ``ranks``, keyword arguments of ``Ranks``."""

    @wraps(command)
    def gathered(*args: Any, max_rank: int | None, **options: Any) -> Any:
        chosen = {name: options.pop(name) for name in ("rank", "energy", "ratio", "parameters")}
        return command(*args, ranks={**chosen, "most": max_rank}, **options)

    for option in (
        click.option("--max-rank", type=int, metavar="R", help="With one of the other three: no rank above this."),
        click.option("--parameters", metavar="N", callback=_count, help="A budget for lora_A and lora_B, e.g. 20M."),
        click.option("--ratio", type=float, metavar="T", help="Singular values above the largest divided by T."),
        click.option("--energy", type=float, metavar="E", help="The least rank that keeps this part of the energy."),
        click.option("--rank", type=int, metavar="R", help="This rank for every module."),
    ):
        gathered = option(gathered)
    return gathered


def writing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add where to write the adapter that the command returns, and write it."""

    @wraps(command)
    def gathered(*args: Any, out: str, to: str, force: bool, as_json: bool, **options: Any) -> None:
        from pathlib import Path

        from .. import api

        given = [options.get(n) for n in ("adapter", "base", "tuned")] + list(options.get("adapters", ()))
        sources = [Path(path) for path in given if path and Path(path).exists()]
        model = options.get("base")
        api.check_output(out, to, force, sources, model)
        with progress(click.get_current_context().info_name or "", 0) as advance:
            outcome = command(*args, force=force, progress=advance, **options)
        notes = api.write_adapter(outcome.adapter, out, to, force, sources, like=model)
        _say(outcome, notes, out, to, as_json)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print a report as JSON (a versioned schema) on stdout."),
        click.option("--force", is_flag=True, help="Write into a directory that is not empty."),
        click.option("--to", default="peft", show_default=True, metavar="FORMAT", help="The format to write."),
        click.option("-o", "--out", required=True, metavar="OUT", help="Directory to write."),
    ):
        gathered = option(gathered)
    return gathered


def _say(outcome: Outcome, notes: tuple[str, ...], out: str, to: str, as_json: bool) -> None:
    from rich.console import Console

    said = [*outcome.adapter.notes, *outcome.notes, *notes]
    for note in said:
        click.echo(f"note: {printable(note)}", err=True)
    if as_json:
        import json

        click.echo(json.dumps({**outcome.as_json(), "out": out, "format": to, "notes": said}, ensure_ascii=False))
    else:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        for part in outcome.table():
            console.print(part)
    click.echo(f"Wrote {to} to {out}.", err=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Called with bytes: a bar with rate and time left on a terminal; else a line for each tenth of a long run.

    ``total`` 0: nobody knows how much there is; then a line every ten seconds.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), *([TimeRemainingColumn()] if total else []))
        with Progress(what, *columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total or None)
            yield lambda count: bar.advance(task, count)
        return
    done, start, said = 0, time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        elapsed = time.monotonic() - start
        if elapsed > 5 and not total and elapsed // 10 > said:
            said = int(elapsed // 10)
            click.echo(f"{what}: {human(done)} in {elapsed:.0f} s", err=True)
        if elapsed > 5 and total and done * 10 // total > said and done < total:
            said = done * 10 // total
            rate = done / elapsed
            click.echo(
                f"{what}: {said * 10} % of {human(total)}, {human(rate)}/s, {(total - done) / rate:.0f} s left",
                err=True,
            )

    yield advance
