"""Formats that are tables: key rules with named groups, dimension labels, a scale rule. Shipped as TOML or the user's.

A table says what each key is and how its dimensions are called; orientation, rank and the magnitude's axis follow from
the labels, so no flag can contradict them. The same rules are read in both directions. ``syntax`` is what a table may
say, ``shapes`` what its labels mean, ``engine`` reads and writes by it, ``starter`` begins one for an unknown file.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

from .. import Format
from .engine import format_of
from .syntax import load, parse


def custom(path: Path) -> Format:
    """The format that a user's table describes. Raises InputError."""
    return format_of(load(path))


def _shipped() -> list[Format]:
    found = sorted((f for f in files(__package__).iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return [format_of(parse(tomllib.loads(file.read_text()), file.name)) for file in found]


FORMATS = _shipped()
