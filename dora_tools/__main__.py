"""``python -m dora_tools``."""

import sys

from .cli import program

sys.exit(program())
