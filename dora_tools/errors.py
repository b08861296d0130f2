"""Every way dora-tools says no, and the exit code that says it.

::

    DoraToolsError                 1
    ├── UsageError                 2   the request contradicts itself
    ├── InputError                 3   an input is unreadable, unrecognised or hostile
    │   └── UnsupportedError       3   it is recognised, and named, and not supported
    ├── FitError                   4   adapter and base do not belong together, or give no usable result
    ├── TargetError                5   what is to be written cannot hold this; the message names the way out
    └── ResourceError              6   disk, memory, device, network

A message is one or more sentences: what, where, expected and found, what to do. An interrupt is not an error: the
command line ends with 130 on KeyboardInterrupt.
"""

from __future__ import annotations


class DoraToolsError(Exception):
    """Base of all errors that dora-tools raises on purpose."""

    exit_code = 1


class UsageError(DoraToolsError):
    """The options or arguments contradict each other."""

    exit_code = 2


class InputError(DoraToolsError):
    """An input cannot be read, is not recognised, or is not what it says it is."""

    exit_code = 3


class UnsupportedError(InputError):
    """An input is recognised and deliberately refused."""


class FitError(DoraToolsError):
    """Adapter and base do not fit together."""

    exit_code = 4


class TargetError(DoraToolsError):
    """The requested output cannot hold the result."""

    exit_code = 5


class ResourceError(DoraToolsError):
    """The machine lacks something: disk, memory, a device, a network."""

    exit_code = 6
