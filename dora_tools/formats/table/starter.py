"""A first table for a file of unknown format: what its names and shapes suggest, with what is a guess marked."""

from __future__ import annotations

import json
import re
from math import prod

from ...checkpoint import Checkpoint


def suggest(checkpoint: Checkpoint, name: str) -> str:
    """A starter table for an unknown file: its kinds of keys, with what their names and shapes suggest.

    What is a guess is marked; scale and what is left open must be filled in by whoever knows the trainer.
    """
    cuts = {key: next((i for i, p in enumerate(key.split(".")) if _HINT.search(p)), 0) for key in checkpoint.tensors}
    adapted = {".".join(key.split(".")[:cut]) for key, cut in cuts.items() if cut}
    kinds: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        parts = key.split(".")
        module = next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in adapted), "")
        tail = key.removeprefix(f"{module}.") if module else f"(not of an adapted module).{parts[-1]}"
        kinds.setdefault(tail, []).append(key)
    lines = [f'name = "{name}"', 'about = "what wrote this"', ""]
    for tail, keys in kinds.items():
        shape = checkpoint.tensors[keys[0]].shape
        if tail.startswith("("):
            lines += [
                f"# {len(keys)} keys like {keys[0]}, shape {list(shape)}: of no adapted module, taken as they are",
                "",
            ]
            continue
        role, dims = _guess(tail, shape)
        lines += [
            f"# {len(keys)} keys like {keys[0]}, shape {list(shape)}",
            "[[key]]",
            f"match = '(?P<module>.+)\\.{re.escape(tail)}'",
            f'role = "{role}"' + ("" if dims else "  # or: alpha, replace (a tensor trained whole)"),
        ]
        lines += [f"dims = {json.dumps(dims)}  # check"] if dims else []
        lines.append("")
    lines += ["[scaling]", 'rule = ["alpha", "alpha/rank", "rslora", "one"]  # keep the one that the trainer uses', ""]
    return "\n".join(lines)


_HINT = re.compile(r"lora|dora|magnitude|adapter|^m$", re.IGNORECASE)


def _guess(tail: str, shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """A role and dimensions: lora_A and lora_B by the name's letter or direction, m by its name, the base by weight."""
    low = tail.lower()
    if low.split(".")[-1] in ("alpha", "lora_alpha") and prod(shape) == 1:
        return "alpha", ()
    if re.search(r"(_|\b)(a|down|in|0)(\.weight)?$", low) and len(shape) == 2:
        return "lora_A", ("rank", "in") if shape[0] <= shape[1] else ("in", "rank")
    if re.search(r"(_|\b)(b|up|out|1)(\.weight)?$", low) and len(shape) == 2:
        return "lora_B", ("out", "rank") if shape[1] <= shape[0] else ("rank", "out")
    if "magnitude" in low or low.split(".")[0] in {"m", "dora_scale", "dora_m", "lora_m"}:
        return "magnitude", ("1", "in") if shape[:1] == (1,) else ("out", "1") if shape[1:] == (1,) else ("out",)
    if low.endswith("weight") and len(shape) == 2:
        return "base", ("out", "in")
    return ("bias", ("out",)) if low.endswith("bias") else ("ignore", ())
