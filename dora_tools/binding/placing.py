"""Where in a base every update and every replacement of an adapter goes, or why it goes nowhere."""

from __future__ import annotations

from difflib import get_close_matches

from ..adapter import Adapter, Dense, Replacement, Toward, Update
from ..checkpoint import equal, ref
from ..errors import FitError
from ..names.pieces import expert_of, parted, spread
from ..names.ties import TASK_HEADS
from .plan import Plan


def place(adapter: Adapter, strength: float, plan: Plan, number: int) -> None:
    """Give every name of the adapter its name in the base, or refuse them all together."""
    known = plan.base.tensors
    if adapter.base_model:
        plan.trained_on = f" The adapter names '{adapter.base_model}' as its base."
    plan.task = adapter.task or plan.task
    names = list(dict.fromkeys(expert_of(u)[0] if u.kind == "expert" else u.name for u in adapter.updates))
    heads = set() if plan.tied_off else (plan.ties or {}).keys()
    rule = plan.places.rule(names, list(adapter.replaced), heads)
    if rule != ("", ""):
        plan.notes.append(f"Names: the adapter's '{rule[0]}…' is the base's '{rule[1]}…'.")

    unplaced: list[str] = []
    placed: dict[tuple[str, tuple[int, int] | None], str] = {}
    spots = ((given, spot) for given in adapter.updates for spot in _spots(given, plan, rule))
    for given, (name, update) in spots:
        if name not in known and name not in heads:
            if not update.optional:
                unplaced.append(name)
            continue
        if (name, update.part) in placed:
            other = placed[name, update.part]
            raise FitError(f"{other} and {given.module} of the adapter are both {name} in the base.")
        placed[name, update.part] = given.module
        plan.updates.setdefault(name, []).append((update, strength))
        plan.touched.setdefault(name, set()).add(number)
        if update.bias is not None:
            bias = name.removesuffix("weight") + "bias"
            if bias not in known:
                raise FitError(
                    f"{update.module} has a trained LoRA bias ({update.bias.key}), but the base has no {bias} to add "
                    "it to, and neither has its architecture, as far as the base tells."
                )
            added = Update(update.module, Dense(update.bias.reshape(-1, 1)), kind="whole", part=update.part)
            plan.updates.setdefault(bias, []).append((added, strength))
            plan.touched.setdefault(bias, set()).add(number)
        if update.magnitude is not None and update.magnitude.scales_bias:
            plan.touched.setdefault(name.removesuffix("weight") + "bias", set()).add(number)
    for original, replacement in adapter.replaced.items():
        name = plan.places.place(original, rule)
        found = [] if name in known else plan.places.find(name)
        if len(found) > 1 or (found and found[0][1] is not None):
            pieces = dict(parted(name, replacement, found, known))
            if pieces.keys() & plan.replaced.keys():
                raise FitError(f"Two of the adapters replace {name} with tensors of their own; only one can be merged.")
            plan.replaced.update(pieces)
            plan.owners.update(dict.fromkeys(pieces, number))
            if strength != 1.0:
                raise FitError(f"The adapter replaces {name} as a whole, in pieces, which no strength can do in part.")
            continue
        of_task = bool(TASK_HEADS & {*name.split(".")}) and not replacement.shared
        if replacement.shared and name not in known and not original.startswith(rule[0]):
            plan.notes.append(f"left out {original}: not in the adapted network ({rule[0]}…).")
            continue
        if name not in known and name not in heads and not of_task:
            unplaced.append(name)
            continue
        if name in plan.replaced:
            raise FitError(f"Two of the adapters replace {name} with tensors of their own; only one can be merged.")
        if (plan.many or strength != 1.0) and _frozen(name, replacement, plan):
            continue
        plan.owners[name] = number
        if strength != 1.0:
            _interpolate(name, replacement, strength, plan)
            continue
        plan.replaced[name] = replacement
        if name not in known and name not in heads:
            plan.notes.append(f"{name} is not in the base; it is added, as the adapter saved it whole.")
    if unplaced:
        raise FitError(_unplaced_sentence(unplaced, len(names) + len(adapter.replaced), plan))


def _frozen(name: str, replacement: Replacement, plan: Plan) -> bool:
    """Whether it is the base's own weight, saved with the rest: PEFT saves the embedding beside its factors."""
    own = name if name in plan.base.tensors else (plan.ties or {}).get(name, "")
    info = plan.base.tensors.get(own)
    alike = replacement.shared and info is not None and info.shape == replacement.tensor.shape
    return alike and equal(ref(plan.base, own), replacement.tensor)


def _spots(update: Update, plan: Plan, rule: tuple[str, str]) -> list[tuple[str, Update]]:
    """The tensors that an update is of, each with what the update is of it; its best name where there is none."""
    known, places = plan.base.tensors, plan.places
    if update.kind != "expert":
        name = places.place(update.name, rule)
        found = [] if name in known else places.find(name) or places.find(update.name)
        return spread(update, found, known) if found else [(name, update)]
    original, number = expert_of(update)
    name = places.place(original, rule)
    name = name if places.find(name) else original
    found = places.expert(name, number)
    if places.find(name) and not found:
        raise FitError(f"The base has no expert {number} of {name}. Is this the right base model?")
    return spread(update, found, known) if found else [(name, update)]


def refuse_mixtures(plan: Plan) -> None:
    """Every adapter is merged from the pristine base, which another adapter's replacement of the tensor is not."""
    for name, owner in plan.owners.items():
        others = plan.touched.get(name, set()) - {owner}
        if others:
            raise FitError(
                f"{name} is saved whole by one of the adapters and changed by another, which was trained on the "
                "base's. Merge them one after the other, if the second was trained on the first."
            )


def _interpolate(name: str, replacement: Replacement, strength: float, plan: Plan) -> None:
    """A replacement by ``strength``, W + w (R − W): of W's shape, without DoRA on top, and not of a tied weight."""
    info, shape = plan.base.tensors.get(name), replacement.tensor.shape
    if info is not None and len(shape) == 1 and equal(ref(plan.base, name), replacement.tensor):
        return  # frozen, and saved with the rest
    weight = plan.updates.get(name.removesuffix("bias") + "weight", ())
    dora = any(update.magnitude is not None for update, _ in plan.updates.get(name, ()))
    dora |= any(u.magnitude is not None and u.magnitude.scales_bias for u, _ in weight)
    ties = {} if plan.tied_off else plan.ties or {}
    if info is None or info.shape != shape or dora or (replacement.shared and name in {*ties, *ties.values()}):
        why = (
            "it is not in the base"
            if info is None
            else "of another shape"
            if info.shape != shape
            else "tied, or DoRA'd"
        )
        raise FitError(
            f"The adapter replaces {name} as a whole, and a strength of {strength:g} cannot do that in part ({why})."
        )
    toward = Toward(replacement.tensor, (info.rows, info.width))
    plan.updates.setdefault(name, []).append((Update(name, toward, kind="whole"), strength))


def _unplaced_sentence(unplaced: list[str], total: int, plan: Plan) -> str:
    base = plan.base
    first = unplaced[0]
    stem = first.removesuffix("weight")
    packed = next((n for n in base.tensors if n.startswith(stem) and n != stem + "bias"), None)
    if packed:
        hint = f"The base has {packed} there, which is not a plain weight"
    elif all(name.endswith("bias") for name in unplaced):
        hint = (
            "The layers of the base have no bias to change, and its architecture may have no place for one; if so, "
            "serve the adapter with PEFT"
        )
    else:
        near = get_close_matches(first, list(base.tensors), n=3, cutoff=0.5)
        hint = f"The nearest names in the base are {', '.join(near)}" if near else "Nothing in the base has such a name"
    more = f" (and {', '.join(unplaced[1:3])}{', …' if len(unplaced) > 3 else ''})" if len(unplaced) > 1 else ""
    return (
        f"{len(unplaced)} of the adapter's {total} tensors and modules have no place in the base: {first}{more}. "
        f"{hint}. Is this the right base model?{plan.trained_on}"
    )
