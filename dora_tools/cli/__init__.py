"""The command line: options and exit codes, no logic. Each command is a module of this package, imported when used."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
import traceback
from typing import Any

import click

from .. import __version__
from ..errors import DoraToolsError

_LONGEST = 4000  # characters of a sentence
COMMANDS = {
    "merge": "Merge adapters into the dense weights of a model.",
    "convert": "Convert an adapter to another tool's format.",
    "to-dora": "Turn a LoRA into a DoRA of the same merged weight.",
    "to-lora": "Turn a DoRA into the best plain LoRA, with its error.",
    "rescale": "Change rank or alpha.",
    "combine": "Make several adapters one.",
    "extract": "Find the adapter between two models.",
    "inspect": "Show what is in an adapter.",
    "formats": "List the adapter formats that can be read and written.",
}


class _Lazy(click.Group):
    """Knows its commands by name and line, and imports one only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dora-tools")
def cli() -> None:
    """Take any DoRA or LoRA adapter and make it usable anywhere.

    ADAPTER and BASE are a directory, a file, or a hub id org/name[@revision].

    \b
    Exit codes: 0 ok · 1 a bug · 2 usage (options, an OUT that exists) ·
    3 input unreadable, unrecognised or hostile · 4 adapter and base do not fit ·
    5 the target cannot hold this · 6 disk, memory, device, network · 130 interrupted.
    DORA_TOOLS_DEBUG=1 shows the traceback of an error.
    """


def program() -> int:
    """``main`` as a process of its own: its memory is buffers, not cycles, and collecting takes a tenth of the time."""
    gc.disable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ‖ shows ?
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    code = main()
    gc.freeze()  # nothing to look through on the way out either
    return code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result: Any = cli.main(args=arguments, prog_name="dora-tools", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was left behind.", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DoraToolsError as error:
        return _say(error, str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(error, f"{where}{error.strerror or error}.", 6)
    except MemoryError as error:
        return _say(error, "Memory ran out. Fewer --threads need less.", 6)
    except Exception as error:
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            return _say(error, "Memory ran out. Fewer --threads need less.", 6)
        return _say(error, f"Unexpected {type(error).__name__}: {error}. This is a bug in dora-tools.", 1)


def printable(sentence: str) -> str:
    """A sentence in which names from a file cannot move the cursor, begin a line, or fill the screen."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]} … {shown[-_LONGEST // 2 :]}"


def _say(error: BaseException, sentence: str, code: int) -> int:
    if os.environ.get("DORA_TOOLS_DEBUG"):
        traceback.print_exception(error)
    click.echo(f"Error: {printable(sentence)}", err=True)
    return code
