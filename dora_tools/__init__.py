"""dora-tools: any DoRA or LoRA adapter, usable anywhere. ``import dora_tools as dt``; names resolve when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .api import combine as combine
    from .api import convert as convert
    from .api import extract as extract
    from .api import inspect as inspect
    from .api import merge as merge
    from .api import merged as merged
    from .api import open_checkpoint as open_checkpoint
    from .api import plan_merge as plan_merge
    from .api import read_adapter as read_adapter
    from .api import rescale as rescale
    from .api import to_dora as to_dora
    from .api import to_lora as to_lora
    from .api import write_adapter as write_adapter
    from .errors import DoraToolsError as DoraToolsError
    from .formats import Given as Given

_HOMES = {
    "Adapter": "adapter",
    "DoraToolsError": "errors",
    "Given": "formats",
    "combine": "api",
    "extract": "api",
    "rescale": "api",
    "to_dora": "api",
    "to_lora": "api",
    "convert": "api",
    "inspect": "api",
    "merge": "api",
    "merged": "api",
    "open_checkpoint": "api",
    "plan_merge": "api",
    "read_adapter": "api",
    "write_adapter": "api",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_tools' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
