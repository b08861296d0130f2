"""NaN and Inf found before an operation spreads them."""

from __future__ import annotations

from ..adapter import Adapter, LowRank
from ..checkpoint import Ref, blocks, single_threaded
from ..errors import InputError, UnsupportedError


def check_finite(adapter: Adapter, threads: int) -> None:
    """Raises InputError for a factor, magnitude, bias or saved tensor that holds NaN or Inf."""
    refs: list[Ref] = [replacement.tensor for replacement in adapter.replaced.values()]
    for update in adapter.updates:
        if isinstance(update.delta, LowRank):
            refs += [update.delta.lora_A, update.delta.lora_B]
        refs += [update.magnitude.vector] if update.magnitude is not None else []
        refs += [update.bias] if update.bias is not None else []

    def bad(promise: Ref) -> tuple[int, int]:
        single_threaded()
        values = promise.load()
        return values.numel() - int(values.isfinite().sum()), values.numel()

    for promise, (count, total) in blocks(refs, bad, threads):
        if count:
            raise InputError(
                f"{promise.key} holds {count} values that are NaN or Inf, of {total}: the training diverged or the "
                "file is damaged."
            )


def check_parameters(adapter: Adapter) -> None:
    """Raises UnsupportedError for a module of which two parameters are adapted: an operation knows modules by name."""
    own: dict[str, str] = {}
    for update in adapter.updates:
        if own.setdefault(update.module, update.parameter) != update.parameter:
            raise UnsupportedError(
                f"{update.module}: both {own[update.module]} and {update.parameter} of it are adapted, which this "
                "operation cannot tell apart. Merge the adapter instead."
            )
