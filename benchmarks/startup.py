"""``python -m benchmarks startup``: how long the command line takes to say something."""

from __future__ import annotations

from pathlib import Path

import click

from .measure import PYTHON, facts, run, show, spread

_ADAPTER = Path(__file__).resolve().parent.parent / "fixtures" / "smollm2-dora"
_TIMES = 9


@click.command("startup")
def command() -> None:
    """Help and inspect beside a bare Python and a bare import of torch."""
    commands: dict[str, list[str | Path]] = {
        "python -c pass": [PYTHON, "-c", "pass"],
        "dora-tools --help": [PYTHON, "-m", "dora_tools", "--help"],
        "dora-tools inspect smollm2-dora": [PYTHON, "-m", "dora_tools", "inspect", _ADAPTER],
        "python -c 'import torch'": [PYTHON, "-c", "import torch"],
    }
    facts(packages=("torch", "click"))
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(_TIMES + 1):
        for name, line in commands.items():
            wall = run(line).wall
            if number:  # the first warms the page cache and bytecode
                times[name].append(wall)
    columns = ["seconds", "min", "median", "max"]
    show(f"{_TIMES} runs each, interleaved", columns, [[name, *spread(t, 3)] for name, t in times.items()])
