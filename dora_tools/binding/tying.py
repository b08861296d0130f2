"""Names that share one weight: which stay tied, and what is untied."""

from __future__ import annotations

from ..adapter import LowRank, Replacement, Update
from ..checkpoint import equal, same
from ..deltas import Tokens
from ..errors import FitError, TargetError, UnsupportedError
from ..layout import human
from ..names.gguf import EMBEDDING, HEAD, Dialect
from ..names.ties import always_tied
from .plan import Plan, set_setting, setting


def _refuse_unknown_ties(plan: Plan) -> None:
    """A model that transformers does not have may tie its vocabulary's weights: touching those would be a guess."""
    vocabulary = setting(plan.config, "vocab_size")
    for name in (*plan.updates, *plan.replaced):
        updates = plan.updates.get(name, ())
        rows = plan.base.tensors[name].shape[:1] if name in plan.base.tensors else ()
        if any(update.kind == "embedding" for update, _ in updates) or rows == (vocabulary,) or not rows:
            raise UnsupportedError(
                f"{name} is changed, and of this model ({plan.architecture or plan.model_type or 'no architecture'}) "
                "dora-tools does not know which of the vocabulary's weights are tied. If none are, write "
                "tie_word_embeddings = false into the base's config.json."
            )


def resolve_ties(plan: Plan) -> None:
    """Where two names share one weight, keep that only while both still agree.

    A name that has neither an update nor a saved copy keeps the base's value: that is what the adapter model's forward
    pass used. When one pair differs all are untied, since the config has a single switch for them.
    """
    if plan.tied_off:
        return
    if plan.ties is None:
        _refuse_unknown_ties(plan)
    known, touched = plan.base.tensors, plan.updates.keys() | plan.replaced.keys()
    ties = dict(plan.ties or {})
    lost = [name for pair in ties.items() for name in pair if name in touched and not any(n in known for n in pair)]
    if lost:
        raise FitError(f"{lost[0]} is tied to a weight that is not in the base under any name that dora-tools knows.")
    ties = {tied: source for tied, source in ties.items() if source in known}
    for tied, source in list(ties.items()):
        if tied in known and touched & {tied, source} and not same(plan.base, tied, plan.base, source):
            del ties[tied]  # both are stored and differ: they are not one weight, whatever the config leaves unsaid
    differing, updates = [], dict(plan.updates)
    for tied, source in ties.items():
        ours, theirs = plan.replaced.get(source), plan.replaced.get(tied)
        if ours and ours.shared and theirs is None:
            theirs = ours
        elif theirs and theirs.shared and ours is None:
            ours = plan.replaced[source] = theirs
        if not _updated_alike(plan, tied, source) or not _equal(ours, theirs):
            differing.append((tied, source))
            continue
        _keep_one_update(plan, tied, source)
        if tied not in known:
            plan.replaced.pop(tied, None)
        elif theirs:
            plan.replaced[tied] = theirs
    if not differing:
        return
    if plan.dialect:
        _allow_untying(plan, plan.dialect)
    if always_tied(plan.model_type):
        tied, source = differing[0]
        raise TargetError(
            f"The adapter makes {tied} and {source} differ, but {plan.model_type} models tie them whatever "
            "their config says, so no checkpoint can hold the result. Train both or neither."
        )
    plan.updates = updates
    for tied, source in ties.items():
        for here, there in ((source, tied), (tied, source)):
            if reaching := _reaching(plan, there, here):
                updates[here] = [*reaching, *updates.get(here, ())]
    for tied, source in ties.items():
        replacement = plan.replaced.get(source)
        if replacement and replacement.shared:
            plan.replaced.setdefault(tied, replacement)
        if tied not in known and tied not in plan.replaced:
            plan.aliases[tied] = source
    set_setting(plan.config, "tie_word_embeddings", False)
    pairs = " and ".join(" and ".join(pair) for pair in differing if touched & {*pair})
    plan.notes.append(f"{pairs} were one weight and now differ: untied{'' if plan.dialect else ', in the config too'}.")


def _updated_alike(plan: Plan, tied: str, source: str) -> bool:
    """Whether both ends of a tie are updated in the same way, or neither; rows of an embedding are the head's too."""
    ours, theirs = plan.updates.get(source, []), plan.updates.get(tied, [])
    if not (ours and theirs):
        return [*ours, *theirs] == _reaching(plan, source, tied) + _reaching(plan, tied, source)
    return len(ours) == len(theirs) and all(
        s == t and _same_change(u, v) for (u, s), (v, t) in zip(ours, theirs, strict=True)
    )


def _reaching(plan: Plan, name: str, other: str) -> list[tuple[Update, float]]:
    """Updates of one end of a tie that are the other's as well: rows of the embedding, if the head has none itself."""
    if name in plan.heads or any(update.shared for update, _ in plan.updates.get(other, ())):
        return []
    return [(update, strength) for update, strength in plan.updates.get(name, ()) if update.shared]


def _keep_one_update(plan: Plan, tied: str, source: str) -> None:
    """Of updates that are alike, those of the source; of both ends, where the base stores both."""
    ours, theirs = plan.updates.pop(source, []), plan.updates.pop(tied, [])
    if ours or theirs:
        plan.updates[source] = ours or theirs
        if tied in plan.base.tensors:
            plan.updates[tied] = theirs or ours


def _same_change(a: Update, b: Update) -> bool:
    """Whether two updates are of equal values, one maybe of the embedding and the other of the head, its transpose."""
    if isinstance(a.delta, Tokens) and isinstance(b.delta, Tokens):
        return a.delta.indices == b.delta.indices and equal(a.delta.tensor, b.delta.tensor)
    if not isinstance(a.delta, LowRank) or not isinstance(b.delta, LowRank) or a.magnitude or b.magnitude:
        return False
    one, two = a.delta, b.delta.turned() if a.delta.shape != b.delta.shape else b.delta
    return one.scaling == two.scaling and equal(one.lora_A, two.lora_A) and equal(one.lora_B, two.lora_B)


def _allow_untying(plan: Plan, dialect: Dialect) -> None:
    size = human(plan.base.tensors[EMBEDDING].nbytes)
    if not dialect.may_untie():
        raise TargetError(
            f"The adapter makes {EMBEDDING} and {HEAD} differ, but of '{dialect.architecture}' models llama.cpp uses "
            "the embedding as the head whatever the file holds. Train both or neither."
        )
    if not plan.untie:
        raise TargetError(
            f"The adapter makes {EMBEDDING} and {HEAD} differ, which are one tensor in this GGUF ({size}). --untie "
            "gives the head a tensor of its own, so that each is as it was trained."
        )


def _equal(a: Replacement | None, b: Replacement | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return equal(a.tensor, b.tensor)
