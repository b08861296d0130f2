"""How an adapter is scaled, and where that was found: asked for where the file does not say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from ...checkpoint import ref
from ...errors import InputError, UsageError
from .keys import Module, Reader
from .syntax import Table


def scaling_of(reader: Reader, rank: int, module: Module) -> tuple[float, str]:
    """The number that is multiplied, and where it comes from. Raises InputError where the file does not say."""
    table, given = reader.table, reader.given
    if given.scaling is not None or given.alpha is not None:
        own, where = _alpha(reader, module, asked=False)
        if own is not None and own != given.alpha and not reader.overridden:
            reader.overridden = f"The file has alpha {own:g} ({where}); what is asked for is used instead."
    if given.scaling is not None:
        return given.scaling, "--scaling"
    if table.scale_rules == ("one",) and (given.alpha is not None or given.scale_rule not in (None, "one")):
        raise UsageError(f"Format '{table.name}' has no alpha: its scaling is 1. --scaling says another number.")
    rule = given.scale_rule or (table.scale_rules[0] if len(table.scale_rules) == 1 else None)
    said = "--scale-rule one" if given.scale_rule else f"1, the rule of {table.name}"
    hparams = reader.checkpoint.metadata.get("hyper_parameters", {})
    flags = reader.checkpoint.metadata.get("hyper_parameter_values", {}).get("use_rslora", [])
    if given.scale_rule is None and rule != "one" and hparams.get("use_rslora") is True:
        rule = "rslora"
    if given.scale_rule is None and True in flags and False in flags:
        raise InputError(f"{module.path}: use_rslora is true and false among the hyper-parameters. Say --scale-rule.")
    attributes = _attributes(reader, module)
    own = _number(attributes.get("scaling")) if given.alpha is None and given.scale_rule is None else None
    if own:
        return own, "scaling of the pickled module"
    if rule is None and given.alpha is None and "alpha" in attributes:
        # of a pickled module: the class that divides by the rank keeps it, the one that does not has no use for it
        rule = "alpha/rank" if "rank" in attributes else "alpha"
    if rule == "one":
        return 1.0, said
    alpha, source = _alpha(reader, module)
    options = " or ".join(f"--scale-rule {r}" for r in table.scale_rules)
    if alpha is None:
        raise InputError(
            f"{module.path}: the file does not record alpha, on which the scale of this adapter (rank {rank}) depends. "
            f"Say --alpha{'' if rule else f' and {options}'}, or --scaling with the number that is multiplied."
        )
    if rule is None:
        numbers = {"alpha": alpha, "alpha/rank": alpha / rank, "rslora": alpha / sqrt(rank), "one": 1.0}
        means = ", ".join(f"{r} gives {numbers[r]:g}" for r in table.scale_rules)
        raise InputError(
            f"{module.path}: alpha is {alpha:g} ({source}), but nothing in the file says how '{table.name}' scales "
            f"with it: {means}. Say {options}, or --scaling with the number that is multiplied."
        )
    if rule == "alpha":
        return alpha, f"alpha, {source}"
    return alpha / (sqrt(rank) if rule == "rslora" else rank), f"{alpha:g}/{'√' * (rule == 'rslora')}{rank}, {source}"


def _attributes(reader: Reader, module: Module) -> Mapping[str, Any]:
    """What a pickled module remembers beside lora_A."""
    path = module.keys["lora_A"][0].rpartition(".")[0]
    found: Mapping[str, Any] = reader.checkpoint.metadata.get("attributes", {}).get(path, {})
    return found


def _alpha(reader: Reader, module: Module, asked: bool = True) -> tuple[float | None, str]:
    checkpoint, given = reader.checkpoint, reader.given
    if given.alpha is not None and asked:
        return given.alpha, "--alpha"
    for name in ("alpha", "lora_alpha"):
        attribute = _number(_attributes(reader, module).get(name))
        if attribute is not None:
            return attribute, f"{name} of the pickled module"
    if "alpha" in module.keys:
        key = module.keys["alpha"][0]
        values = ref(checkpoint, key).load()
        number = _number(values.item()) if values.numel() == 1 else None
        if number is None:
            raise InputError(f"{key} (shape {list(values.shape)}) is no number; an alpha is one.")
        return number, key
    candidates: dict[float, str] = {}
    for source in reader.table.alpha:
        kind, _, name = source.partition(":")
        if kind == "hparam":
            settings = checkpoint.metadata.get("hyper_parameters", {})
            every = checkpoint.metadata.get("hyper_parameter_values", {}).get(name, [settings.get(name)])
            numbers = [(_number(value), f"hyper_parameters.{name}") for value in every]
        elif kind == "config":
            config = checkpoint.metadata.get("adapter_config")
            numbers = [(_number(config.get(name)) if isinstance(config, Mapping) else None, f"adapter_config.{name}")]
        else:
            numbers = [] if candidates else [(float(name), f"the table's {name}")]
        candidates |= {value: where for value, where in numbers if value is not None and value not in candidates}
    if len(candidates) > 1 and asked:
        said = ", ".join(f"{where} is {value:g}" for value, where in candidates.items())
        raise InputError(f"{module.path}: {said}. Which one is the adapter's alpha? Say it with --alpha.")
    return next(iter(candidates.items()), (None, ""))


def _number(value: object) -> float | None:
    """A setting as a finite number, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)


def rank_notes(reader: Reader, modules: Sequence[Module]) -> Iterable[str]:
    """A rank among the hyper-parameters that no factor has: they may be those of another run."""
    hparams = reader.checkpoint.metadata.get("hyper_parameters", {})
    ranks = {module.sizes["rank"] for module in modules if "rank" in module.sizes}
    for name in ("lora_rank", "lora_r", "rank", "r"):
        said = hparams.get(name)
        if isinstance(said, int) and not isinstance(said, bool) and ranks and said not in ranks:
            yield f"hyper_parameters.{name} is {said}, but the factors have rank {', '.join(map(str, sorted(ranks)))}."


def told_scale(table: Table, rank: int, config_alpha: int | None) -> float:
    """The scaling that a reader of what is written finds there: of the config's alpha, or the table's own; else 1."""
    literal = next((float(s.partition(":")[2]) for s in table.alpha if s.startswith("literal:")), None)
    alpha = config_alpha if config_alpha is not None else literal
    rule = table.scale_rules[0]
    if alpha is None or rule == "one":
        return 1.0
    return alpha / {"alpha": 1, "alpha/rank": rank, "rslora": sqrt(rank)}[rule]
