"""PEFT's keys, ``[base_model.model.]<module>.<leaf>[.<adapter>][.weight]``: each to its module and role, once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...adapter import Replacement
from ...checkpoint import Checkpoint, ref
from ...errors import InputError, UnsupportedError
from ...names.patterns import ADAPTER_PART

WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
TOKENS = "trainable_tokens_delta"


@dataclass
class Module:
    """The keys of one adapted module by leaf. ``depth``: how many further adapters of the same module stand around it;
    ``within``: the adapted module that it is a part of, if it is.
    """

    path: str
    depth: int = 0
    within: str | None = None
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class Keys:
    """All keys of a file. ``shared``: those of no module, by leaf; ``tokens``: replaced rows, by module.

    ``options`` and ``renamed``: what is written otherwise than it was read, so that a newer PEFT means the same by it.
    """

    modules: dict[tuple[str, int], Module] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def sort_keys(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    leaves: Collection[str],
    only_training: Collection[str],
    begins: Callable[[str], bool],
) -> Keys:
    """Every key to a module's role, to a replacement, or to ``left_out`` with the reason.

    ``leaves``: the method's own; ``only_training``: those that a merge has no use for; ``begins``: whether a segment
    is a leaf at all. Raises UnsupportedError for a leaf that is neither, InputError for keys that make no sense.
    """
    keys = Keys()
    adapters: set[str] = set()
    saved = config.get("modules_to_save") or ()
    for key in checkpoint.tensors:
        path = [segment for segment in key.removeprefix("module.").split(".") if segment not in WRAPPERS]
        beside = path[:1] == ["base_model"] and path[1:2] != ["model"]
        if path[:2] == ["base_model", "model"]:
            path = path[2:]
        if not path or not all(path):
            raise InputError(f"{key!r} is no name of a tensor in a model.")
        at = next((i for i, segment in enumerate(path) if begins(segment)), None)
        if TOKENS in path:
            at = path.index(TOKENS)
            module = ".".join(s for s in path[:at] if s not in ("token_adapter", "base_layer"))
            if module in keys.tokens:
                raise InputError(f"{key} and {keys.tokens[module]} are the same rows of {module}, twice.")
            keys.tokens[module] = key
            continue
        if at is None and ADAPTER_PART.search(key):
            raise InputError(f"{key} belongs to an adapter, but is none of PEFT's keys: is the file of two formats?")
        if at is None:
            _sort_saved(checkpoint, key, path, saved, keys)
            continue
        leaf, tail = path[at], path[at + 1 :]
        if leaf in only_training:
            keys.left_out[key] = "used while training only"
            continue
        name = tail.pop() if tail and tail[-1] in {"weight", "bias"} else "weight"
        role = leaf if name == "weight" else f"{leaf}.{name}"
        if role not in leaves:
            raise UnsupportedError(f"{key}: PEFT's '{leaf}' {name} is not something dora-tools can merge.")
        adapters.add(".".join(tail))
        if len(adapters) > 1:
            names = ", ".join(sorted(repr(name or "default") for name in adapters))
            raise InputError(f"The file holds several adapters ({names}); save the one that is wanted alone.")
        if beside and at == 1:
            parts, where = keys.shared, "the adapter"
        else:
            module_of = _module(path[:at])
            module_of = keys.modules.setdefault((module_of.path, module_of.depth), module_of)
            parts, where = module_of.parts, module_of.path
        if role in parts:
            raise InputError(f"{key} and {parts[role]} are the same tensor of {where}, twice.")
        parts[role] = key
    return keys


def _module(path: list[str]) -> Module:
    """``a.base_layer.base_layer`` is a, at depth 2; ``a.base_layer.b`` is a.b, within a."""
    depth = 0
    while path and path[-1] == "base_layer":
        path, depth = path[:-1], depth + 1
    within = ".".join(path[: path.index("base_layer")]) if "base_layer" in path else None
    return Module(".".join(segment for segment in path if segment != "base_layer"), depth, within)


def saved_whole(module: str, saved: Collection[str]) -> bool:
    """Whether ``modules_to_save`` names a module or what it is a part of. PEFT compares the ends of paths as texts, so
    that classifier is also pre_classifier.
    """
    segments = module.split(".")
    paths = [".".join(segments[: end + 1]) for end in range(len(segments))]
    return any(path.endswith(name) for path in paths for name in saved)


def _sort_saved(checkpoint: Checkpoint, key: str, path: list[str], saved: Collection[str], keys: Keys) -> None:
    if "original_module" in path:
        keys.left_out[key] = "the untrained copy that PEFT keeps beside a saved module"
        return
    own = "modules_to_save" in path
    if own:
        at = path.index("modules_to_save")
        # modules_to_save[.<adapter name>].<parameter>
        path = path[:at] + (path[at + 2 :] if len(path) - at > 2 else path[at + 1 :])
    path = [segment for segment in path if segment not in ("base_layer", "token_adapter")]
    name = ".".join(path)
    module = ".".join(path[:-1])
    own |= saved_whole(module, saved)
    if 0 in checkpoint.tensors[key].shape:
        raise InputError(
            f"{key} is empty (shape {list(checkpoint.tensors[key].shape)}): it was saved under DeepSpeed ZeRO-3 or "
            "FSDP without gathering. Save it again with the parameters gathered."
        )
    previous = keys.replaced.get(name)
    if previous is not None:
        again = ref(checkpoint, key)
        if again.shape != previous.tensor.shape or not bool((again.load() == previous.tensor.load()).all()):
            raise InputError(f"{key} and {previous.tensor.key} are both {name}, with different values: which is it?")
        keys.left_out[previous.tensor.key if own else key] = f"a second copy of {name}"
        if not own:
            return
    keys.replaced[name] = Replacement(ref(checkpoint, key), shared=not own)
