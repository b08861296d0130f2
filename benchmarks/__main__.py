"""``python -m benchmarks``."""

from __future__ import annotations

import click

from . import gguf, merge, operations, startup


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Timings that come with what they are compared to, taken in the same run. Linux only."""


main.add_command(gguf.command)
main.add_command(merge.command)
main.add_command(operations.command)
main.add_command(startup.command)
main()
