"""Checkpoints of Lightning, Fabric and plain training loops: the state dict inside, with what stands around it.

A wrapper: it finds the tensors of the network, takes off what training put around their names, makes the
hyper-parameters readable (as data; nothing is executed), and hands the rest back to detection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint, View
from ..errors import InputError, UnsupportedError
from ..names.patterns import ADAPTER_PART
from ..names.places import places_of
from ..names.ties import TASK_HEADS, may_be_tied
from . import Format, Given, Reading, read

_WRAPPERS = {
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_offload_wrapped_module",
}
# where the network's tensors lie in the saved object
_STATES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_ATTRIBUTES = re.compile(r"(model|net|network|backbone|llm|lm|module|transformer_model)\.")
_PEFT = re.compile(r"^((?:[\w.]+\.)?)base_model\.model\.")  # the PeftModel between the attribute and the network
_COPIES = re.compile(r"(^|\.)(ema(_\w+)?|\w+_ema|averaged?_model|swa_model)\.")
_HPARAMS = ("hyper_parameters", "hparams", "module_arguments", "datamodule_hyper_parameters", "config", "args")
_TRAINING = re.compile(  # what training keeps beside the network: no weights, and too many to list
    r"optim\w*|opt_states?|(lr_)?schedul\w*|callbacks?|\w*loops?|(grad_)?scaler\w*|amp|rng\w*|random_states?|metrics?|"
    + "|".join(_HPARAMS)
)
_INNER = re.compile(
    r"(lora|peft|adapter|model|train|training)?_?(config|cfg|conf|args|params|hparams|opts?|options)|lora|peft|adapter|model"
)


def _state(checkpoint: Checkpoint) -> str | None:
    """The key of the saved object that holds the network's tensors; None where the object is the state dict itself."""
    saved = checkpoint.metadata.get("object")
    if checkpoint.metadata.get("whole_module"):
        return None  # a pickled module: its state dict is what the container gives
    if isinstance(saved, dict):
        return next((key for key in _STATES if isinstance(saved.get(key), dict) and saved[key]), None)
    tops = {name.partition(".")[0] for name in checkpoint.tensors}
    beside = [top for top in tops if _TRAINING.fullmatch(top)]
    if beside and len(tops) == len(beside) + 1:  # a distributed checkpoint of a plain training loop
        return next((key for key in _STATES if key in tops), None)
    if "meta" in checkpoint.metadata:  # a sharded checkpoint: the tensors lie beside the object
        return next((key for key in _STATES if any(n.startswith(f"{key}.") for n in checkpoint.tensors)), None)
    return None


def _wrapped(name: str) -> bool:
    return bool(_WRAPPERS & {*name.split(".")}) or name.startswith("module.")


def _sniff(checkpoint: Checkpoint) -> bool:
    if "adapter_config" in checkpoint.metadata:
        return False
    return _state(checkpoint) is not None or any(_wrapped(name) for name in checkpoint.tensors)


def _read(checkpoint: Checkpoint, given: Given) -> Reading:
    state, left_out = _state(checkpoint), dict[str, str]()
    prefix, asked = f"{state}." if state else "", given.prefix.rstrip(".") + "."
    if given.prefix and any(name.startswith(asked) for name in checkpoint.tensors) and not asked.startswith(prefix):
        prefix, given = asked, replace(given, prefix="")  # another network than the one that is found by itself
    names: dict[str, str] = {}
    chosen = bool(given.prefix) or prefix == asked
    for name in checkpoint.tensors:
        if not name.startswith(prefix):
            left_out |= _beside(name, prefix, chosen)
            continue
        inner = _unwrapped(name.removeprefix(prefix))
        inner = _PEFT.sub(r"\1", inner)
        if "_flat_param" in inner:
            raise UnsupportedError(
                f"{name} is a flattened FSDP parameter; save the full state dict, or the sharded one."
            )
        if _COPIES.search(inner):
            left_out[inner] = "a running average of the weights"
            continue
        if inner in names:
            raise InputError(f"{name} and {names[inner]} are both '{inner}' without the wrappers in their names.")
        names[inner] = name
    opaque = checkpoint.metadata.get("opaque", {})
    for name in opaque:
        if not name.startswith(prefix):
            left_out |= _beside(name, prefix, chosen)
    hparams, values = _hyper_parameters(checkpoint)
    metadata: dict[str, Any] = {
        "hyper_parameters": hparams,
        "hyper_parameter_values": values,
        "opaque": {k.removeprefix(prefix): v for k, v in opaque.items() if k.startswith(prefix)},
        "config": {},
        "attributes": {
            _unwrapped(path.removeprefix(prefix)): held
            for path, held in checkpoint.metadata.get("attributes", {}).items()
            if path.startswith(prefix)
        },
    }
    if isinstance(hparams.get("peft_type"), str):
        metadata["adapter_config"] = hparams
    inside = View(
        {inner: (checkpoint, name) for inner, name in names.items()},
        {inner: checkpoint.tensors[name] for inner, name in names.items()},
        metadata,
    )
    reading = read(inside, "The state dict in the checkpoint", given.inside, given)
    reading = replace(reading, left_out={**reading.left_out, **left_out})
    if given.prefix:
        return reading
    return _as_in_the_base(reading, given.base()) if given.base else _of_the_network(reading)


def _beside(name: str, prefix: str, chosen: bool) -> dict[str, str]:
    """Why a tensor outside of the network is left out, if that is worth a word. Raises InputError for an adapter's."""
    if _TRAINING.fullmatch(name.partition(".")[0]):
        return {}
    if _COPIES.search(name):
        return {name: "a running average of the weights"}
    if ADAPTER_PART.search(name) and not chosen:
        raise InputError(
            f"{name} looks like a part of an adapter, outside of '{prefix}…' where the network is. Say which "
            "network is meant with --prefix."
        )
    return {name: f"not of the network ('{prefix}…')"}


def _unwrapped(name: str) -> str:
    return ".".join(s for s in name.removeprefix("module.").split(".") if s not in _WRAPPERS)


def _as_in_the_base(reading: Reading, base: Checkpoint) -> Reading:
    """Names without what the base's do not have before them; what has no place there is left out."""
    modules = [f"{update.module}.weight" for update in reading.adapter.updates]
    places = places_of(base)
    drop, add = places.rule(modules, list(reading.adapter.replaced))
    return reading if add or not drop else reading.within(drop, base.tensors.keys())


def _of_the_network(reading: Reading) -> Reading:
    """Names as the network has them: without the module's attribute that holds it; other networks are left out."""
    updates = reading.adapter.updates
    match = _ATTRIBUTES.match(updates[0].module) if updates else None
    root = match[0] if match and all(update.module.startswith(match[0]) for update in updates) else ""
    names = [*reading.adapter.replaced, *(reading.base.tensors if reading.base else ())]
    heads = [n for n in names if not n.startswith(root) and (may_be_tied(n) or TASK_HEADS & {*n.split(".")})]
    if root and heads:  # names of a whole language model, or a head beside the network: nothing of that may be lost
        note = f"The names are the checkpoint's own, as {heads[0]} stands beside '{root}…'; --prefix takes a part."
        return replace(reading, adapter=replace(reading.adapter, notes=(*reading.adapter.notes, note)))
    return reading.within(root) if root else reading


def _hyper_parameters(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Everything that was saved beside the weights under the usual names, flat; outer names win over inner ones.

    And every value that a name has at some level, as two of them may differ.
    """
    saved = checkpoint.metadata.get("object", checkpoint.metadata.get("meta"))
    found: dict[str, Any] = {}
    values: dict[str, list[Any]] = {}
    seen: dict[int, Any] = {}
    todo = [_plain(saved[key], seen) for key in _HPARAMS if key in saved] if isinstance(saved, dict) else []
    known = set[int]()
    for level in todo:  # grows on the way
        if isinstance(level, Mapping) and id(level) not in known:
            known.add(id(level))
            found = {**level, **found}
            for name, value in level.items():
                values.setdefault(name, []).append(value)
            todo += [v for k, v in level.items() if isinstance(v, Mapping) and (_INNER.fullmatch(k) or "r" in v)]
    return found, values


def _plain(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Inert records as dictionaries of their attributes; enumerations as their value; the rest as it is.

    An object that is there more than once is made once; numbers that no setting can be, and what lies too deep, are
    None.
    """
    if isinstance(value, str | bool | float | None):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else None
    if depth > 20:
        return None
    if id(value) not in seen:
        seen[id(value)] = None  # within itself
        seen[id(value)] = _made_plain(value, seen, depth)
    return seen[id(value)]


def _made_plain(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v, seen, depth + 1) for k, v in value.items() if isinstance(k, str)}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, seen, depth + 1) for v in value]
    if getattr(value, "items", None):  # a subclass of dict or list
        return _plain(value.items, seen, depth + 1)
    attributes = getattr(value, "attributes", None)
    if attributes:
        for holder in ("_val", "_content"):  # OmegaConf's values and containers
            if holder in attributes:
                return _plain(attributes[holder], seen, depth + 1)
        return {k: _plain(v, seen, depth + 1) for k, v in attributes.items() if isinstance(k, str)}
    args = getattr(value, "args", None)
    return args[0] if args and len(args) == 1 and isinstance(args[0], str | int | float) else None


FORMAT = Format(
    "lightning",
    "Lightning, Fabric and plain training checkpoints, with any of the other formats inside",
    _sniff,
    _read,
    unwraps=True,
)
