"""Which base tensor each update and each replacement lands on, and what the config must say afterwards.

Works on names and shapes alone, so everything that does not fit is said before a byte is read or written. The result
is a *view* of the base (replacements laid over it, tied heads given a tensor of their own, conv weights as matrices)
and, for every tensor that changes, its updates turned the way the base stores it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Any

from .adapter import Adapter, Delta, Dense, LowRank, Magnitude, Replacement, Toward, Unchanged, Update
from .checkpoint import Checkpoint, TensorInfo, Tensors, arranged, equal, overlay, ref, same
from .deltas import Tokens
from .dtypes import DTYPES
from .errors import FitError, TargetError, UnsupportedError
from .layout import human
from .names.gguf import EMBEDDING, HEAD, Dialect, of_gguf
from .names.pieces import expert_of, parted, spread, unstacked
from .names.places import Places
from .names.replication import replicated
from .names.ties import CONV1D_LAYERS, CONV1D_MODELS, LABEL_HEADS, TASK_HEADS, always_tied, ties_of


@dataclass(frozen=True, slots=True)
class Bound:
    """One update on one stored matrix: ``delta`` and ``magnitude`` as the base stores it, rows first.

    ``turned``: the base stores the transpose of what the update is of. ``follows``: for a bias that is multiplied by
    the factors m / n of a weight: its name, and which of its updates. ``part``: the rows [first, last) of the stored
    matrix that it is of; None: all.
    """

    module: str
    delta: Delta
    magnitude: Magnitude | None
    strength: float = 1.0
    follows: tuple[str, int] | None = None
    turned: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Binding:
    """The base as a view, the updates of each of its tensors, and the edited config (None: as it was).

    ``saved``: what the adapter brings whole, whether it replaces a tensor of the base or is added.
    """

    base: Checkpoint
    bound: Mapping[str, tuple[Bound, ...]]
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    saved: frozenset[str] = frozenset()
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Plan:
    """A binding in the making."""

    base: Checkpoint
    config: dict[str, Any]
    updates: dict[str, list[tuple[Update, float]]] = field(default_factory=dict)
    replaced: dict[str, Replacement] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    touched: dict[str, set[int]] = field(default_factory=dict)  # which of the adapters update a tensor
    owners: dict[str, int] = field(default_factory=dict)  # which of them replaces it
    trained_on: str = ""
    task: str | None = None
    dialect: Dialect | None = None  # of a GGUF base
    untie: bool = False
    many: bool = False  # adapters

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""

    @property
    def model_type(self) -> str:
        return self.places.model_type

    @cached_property
    def places(self) -> Places:
        return Places(self.base.tensors, self.config)

    @property
    def ties(self) -> dict[str, str] | None:
        """Tied name → the name of what it is tied to, as this base spells them; None for an unknown language model."""
        if self.dialect:
            return {HEAD: EMBEDDING}
        if self.config and not self.architecture:
            return None
        ties = ties_of(self.architecture, self.task)
        if ties is None:
            return None
        pairs = {self.places.own(tied): self.places.own(source) for tied, source in ties.items()}
        known = self.base.tensors  # a file may hold either end
        return {
            t if s in known or t not in known else s: s if s in known or t not in known else t for t, s in pairs.items()
        }

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of what is tied to an embedding; rows that were trained in one are no other's."""
        if self.dialect:
            return frozenset({HEAD})
        return frozenset(self.places.own(tied) for tied in ties_of(self.architecture, self.task) or {})

    @property
    def tied_off(self) -> bool:
        return _setting(self.config, "tie_word_embeddings") is False

    def knows(self, name: str) -> bool:
        return name in self.base.tensors or name in self.aliases or name in self.replaced

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.replaced:
            return self.replaced[name].tensor.shape
        return self.base.tensors[self.aliases.get(name, name)].shape


def bind(adapters: Sequence[tuple[Adapter, float]], base: Checkpoint, untie: bool = False) -> Binding:
    """Place every update and replacement of the adapters, each with its strength. Raises FitError, TargetError.

    Onto a GGUF base the adapters are translated to its names and row orders first; ``untie`` lets a change of its
    embedding or head alone give the head a tensor of its own.
    """
    dialect = of_gguf(base) if "gguf" in base.metadata else None
    original = {} if dialect else base.metadata.get("config") or {}
    refuse_quantised(original)
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in original.items()}
    layers = {adapter.layers for adapter, _ in adapters}
    if len(layers) > 1:
        raise FitError("The adapters were trained on differently replicated layers (layer_replication).")
    base, notes = replicated(base, config, layers.pop()) if any(layers) else (base, [])
    plan = _Plan(base, config, notes=notes)
    plan.dialect, plan.untie, plan.many = dialect, untie, len(adapters) > 1
    for number, (adapter, strength) in enumerate(adapters):
        _place(dialect.adapter(unstacked(adapter)) if dialect else adapter, strength, plan, number)
    _refuse_mixtures(plan)
    _resolve_ties(plan)
    _fit_vocabulary(plan)
    _fit_labels(plan)
    added = tuple(name for name in (*plan.replaced, *plan.aliases) if name not in base.tensors)
    view = arranged(base, plan.aliases)
    view = overlay(view, _replacements(plan, view))
    bound, widths = _orient(plan, view)
    if widths:
        view = arranged(view, widths=widths)
    return Binding(
        view,
        bound,
        tuple(name for name in plan.replaced if name not in added),
        added,
        frozenset(plan.replaced),
        plan.config if plan.config != original else None,
        tuple(plan.notes),
    )


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for a config.json that says its weights are quantised."""
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation
        raise UnsupportedError(
            f"The base is quantised ({method}); dora-tools merges into dense weights. Give the base it was made from, "
            "or a dequantised copy."
        )


def _place(adapter: Adapter, strength: float, plan: _Plan, number: int) -> None:
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


def _frozen(name: str, replacement: Replacement, plan: _Plan) -> bool:
    """Whether it is the base's own weight, saved with the rest: PEFT saves the embedding beside its factors."""
    own = name if name in plan.base.tensors else (plan.ties or {}).get(name, "")
    info = plan.base.tensors.get(own)
    alike = replacement.shared and info is not None and info.shape == replacement.tensor.shape
    return alike and equal(ref(plan.base, own), replacement.tensor)


def _spots(update: Update, plan: _Plan, rule: tuple[str, str]) -> list[tuple[str, Update]]:
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


def _refuse_mixtures(plan: _Plan) -> None:
    """Every adapter is merged from the pristine base, which another adapter's replacement of the tensor is not."""
    for name, owner in plan.owners.items():
        others = plan.touched.get(name, set()) - {owner}
        if others:
            raise FitError(
                f"{name} is saved whole by one of the adapters and changed by another, which was trained on the "
                "base's. Merge them one after the other, if the second was trained on the first."
            )


def _interpolate(name: str, replacement: Replacement, strength: float, plan: _Plan) -> None:
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


def _unplaced_sentence(unplaced: list[str], total: int, plan: _Plan) -> str:
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


def _refuse_unknown_ties(plan: _Plan) -> None:
    """A model that transformers does not have may tie its vocabulary's weights: touching those would be a guess."""
    vocabulary = _setting(plan.config, "vocab_size")
    for name in (*plan.updates, *plan.replaced):
        updates = plan.updates.get(name, ())
        rows = plan.base.tensors[name].shape[:1] if name in plan.base.tensors else ()
        if any(update.kind == "embedding" for update, _ in updates) or rows == (vocabulary,) or not rows:
            raise UnsupportedError(
                f"{name} is changed, and of this model ({plan.architecture or plan.model_type or 'no architecture'}) "
                "dora-tools does not know which of the vocabulary's weights are tied. If none are, write "
                "tie_word_embeddings = false into the base's config.json."
            )


def _resolve_ties(plan: _Plan) -> None:
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
    _set(plan.config, "tie_word_embeddings", False)
    pairs = " and ".join(" and ".join(pair) for pair in differing if touched & {*pair})
    plan.notes.append(f"{pairs} were one weight and now differ: untied{'' if plan.dialect else ', in the config too'}.")


def _updated_alike(plan: _Plan, tied: str, source: str) -> bool:
    """Whether both ends of a tie are updated in the same way, or neither; rows of an embedding are the head's too."""
    ours, theirs = plan.updates.get(source, []), plan.updates.get(tied, [])
    if not (ours and theirs):
        return [*ours, *theirs] == _reaching(plan, source, tied) + _reaching(plan, tied, source)
    return len(ours) == len(theirs) and all(
        s == t and _same_change(u, v) for (u, s), (v, t) in zip(ours, theirs, strict=True)
    )


def _reaching(plan: _Plan, name: str, other: str) -> list[tuple[Update, float]]:
    """Updates of one end of a tie that are the other's as well: rows of the embedding, if the head has none itself."""
    if name in plan.heads or any(update.shared for update, _ in plan.updates.get(other, ())):
        return []
    return [(update, strength) for update, strength in plan.updates.get(name, ()) if update.shared]


def _keep_one_update(plan: _Plan, tied: str, source: str) -> None:
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


def _allow_untying(plan: _Plan, dialect: Dialect) -> None:
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


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting of the model, or of its text part in a multimodal config."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, Mapping) else None)


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    if not config:
        return  # the base has no config.json to edit
    text = config.get("text_config")
    if isinstance(text, dict):
        text[key] = value
    if not isinstance(text, dict) or key in config or key == "tie_word_embeddings":
        config[key] = value


def _fit_vocabulary(plan: _Plan) -> None:
    """A replacement of the base's shape, or of another number of rows where that is the vocabulary."""
    old = _setting(plan.config, "vocab_size")
    vocabulary = {name for pair in (plan.ties or {}).items() for name in pair}
    heads = {name for name in plan.replaced if f".{name}".endswith(LABEL_HEADS)}
    for name, replacement in plan.replaced.items():
        info = plan.base.tensors.get(name)
        found = replacement.tensor.shape
        if info is not None and not DTYPES[info.dtype].floating and DTYPES[replacement.tensor.dtype].floating:
            raise FitError(f"{name} is stored as {info.dtype} in {info.file}; {replacement.tensor.key} has fractions.")
        if info is None or info.shape == found:
            continue
        if name.removesuffix("bias").removesuffix("weight") + "weight" in heads and info.shape[1:] == found[1:]:
            continue
        if (
            not found
            or not info.shape
            or info.shape[1:] != found[1:]
            or (info.shape[0] != old and name not in vocabulary)
        ):
            raise FitError(
                f"{replacement.tensor.key} replaces {name} and has shape {list(found)}, but the base's, in "
                f"{info.file}, has {list(info.shape)}. Is this the right base model?{plan.trained_on}"
            )
        if _setting(plan.config, "vocab_size") != found[0]:
            _set(plan.config, "vocab_size", found[0])
            plan.notes.append(f"{name} has {found[0]} rows, not {info.shape[0]}: vocab_size {old} becomes {found[0]}.")
    for tied, source in (plan.ties or {}).items():
        if (source in plan.replaced or tied in plan.replaced) and plan.knows(tied) and plan.knows(source):
            rows, others = plan.shape(source)[0], plan.shape(tied)[0]
            if rows != others:
                raise FitError(
                    f"{source} would have {rows} rows and {tied} {others}: the adapter resized only one of them, and "
                    "no config can describe that."
                )


def _fit_labels(plan: _Plan) -> None:
    """A classifier brings its number of labels, which the config must know to load it."""
    for name, replacement in plan.replaced.items():
        shape = replacement.tensor.shape
        if len(shape) != 2 or not f".{name}".endswith(LABEL_HEADS):
            continue
        labels = plan.config.get("id2label")
        labels = labels if isinstance(labels, dict) and labels else {"0": "LABEL_0", "1": "LABEL_1"}
        if len(labels) != shape[0] and plan.config:
            plan.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(shape[0])}
            plan.config["label2id"] = {f"LABEL_{i}": i for i in range(shape[0])}
            plan.notes.append(f"{name} has {shape[0]} labels: the config says so now, with names LABEL_0, LABEL_1, ….")


def _replacements(plan: _Plan, view: Checkpoint) -> Tensors:
    """The replacements as a checkpoint; those that are new take the base's commonest type and its last file."""
    floats = Counter(info.dtype for info in view.tensors.values() if DTYPES[info.dtype].floating)
    dtype = floats.most_common(1)[0][0] if floats else "F32"
    last = max((info.file for info in view.tensors.values()), default="model.safetensors")
    return Tensors({n: replace(r.tensor, dtype=dtype) for n, r in plan.replaced.items()}, last)


def _orient(plan: _Plan, view: Checkpoint) -> tuple[dict[str, tuple[Bound, ...]], dict[str, int]]:
    """Every update checked against the shape of its tensor and turned to it; and the row widths of conv weights."""
    bound: dict[str, tuple[Bound, ...]] = {}
    widths: dict[str, int] = {}
    turned = _turned_rule(plan, view)
    for name, updates in plan.updates.items():
        info = view.tensors[name]
        if not DTYPES[info.dtype].floating:
            raise UnsupportedError(
                f"{name} is stored as {info.dtype} in {info.file}: a quantised base. Give the base it was made from, "
                "or a dequantised copy."
            )
        bounds: list[Bound] = []
        for update, strength in updates:
            out, in_ = update.delta.shape
            stored = (info.shape[0], prod(info.shape[1:])) if len(info.shape) > 1 else (0, 0)
            if len(info.shape) > 2 and not update.kernel_size and prod(info.shape[2:]) != 1:
                stored = (0, 0)  # a stack of matrices: no linear layer
            if update.part is not None:
                first, last = update.part
                stored = (last - first, info.width) if 0 <= first < last <= info.rows else (0, 0)
            if isinstance(update.delta, Tokens):
                _check_tokens(update.delta, name, info)
            if update.kind == "whole":
                if out not in (-1, info.rows) and update.part is None:
                    raise FitError(_misfit_sentence(update, (out, in_), info, plan))
                delta = update.delta.onto(ref(view, name).reshape(info.rows, -1))
                bounds.append(Bound(update.module, delta, None, strength, part=update.part))
                continue
            turn = update.kind == "embedding" or (
                turned(update, stored)
                if update.kind == "linear"
                else update.kind == "expert" and _turned_expert(update, stored)
            )
            expected = (in_, out) if turn else (out, in_)
            conv_fits = not update.kernel_size or info.shape[1:] == update.kernel_size
            if not _fits(expected, stored) or not conv_fits:
                raise FitError(_misfit_sentence(update, expected, info, plan))
            if len(info.shape) > 2 and update.part is None:
                widths[name] = stored[1]
            magnitude = update.magnitude
            delta = update.delta.turned() if turn else update.delta
            matrix = ref(view, name).reshape(-1, stored[1])
            bounds.append(
                Bound(
                    update.module,
                    delta.onto(matrix.rows(slice(*update.part)) if update.part else matrix),
                    magnitude.turned() if magnitude and turn else magnitude,
                    strength,
                    turned=turn,
                    part=update.part,
                )
            )
        bound[name] = tuple(bounds)
    for name, on_weight in list(bound.items()):
        bias = name.removesuffix("weight") + "bias"
        followers = [
            Bound(b.module, Unchanged((view.tensors[bias].shape[0], 1)), None, b.strength, (name, i), part=b.part)
            for i, b in enumerate(on_weight)
            if b.magnitude is not None and b.magnitude.scales_bias and bias in view.tensors
        ]
        if followers:
            bound[bias] = (*bound.get(bias, ()), *followers)
    return bound, widths


def _turned_expert(update: Update, stored: tuple[int, int]) -> bool:
    """Whether the base stores the transpose of what an expert's factors make: by shape, else as the reader was told."""
    out, in_ = update.delta.shape
    if out != in_:
        return stored == (in_, out)
    if not update.told:
        raise UnsupportedError(
            f"{update.module} is square, so which of its axes lora_A is of is not told by shape, nor by what the file "
            "says of its PEFT. Say --expert-lora-a first (PEFT up to 0.18 always; later of models like gpt-oss under "
            "transformers 5) or last (PEFT since 0.19.1 of other models, and under transformers 4)."
        )
    return bool(update.transposed)


def _check_tokens(delta: Tokens, name: str, info: TensorInfo) -> None:
    if delta.shape[1] != info.width or max(delta.indices, default=0) >= info.rows:
        raise FitError(
            f"{delta.tensor.key} holds rows of {delta.shape[1]} numbers for tokens up to "
            f"{max(delta.indices, default=0)}, but {name} in {info.file} has shape {list(info.shape)}. Is this the "
            "right base model, with its vocabulary resized as in training?"
        )


def _turned_rule(plan: _Plan, view: Checkpoint) -> Callable[[Update, tuple[int, int]], bool]:
    """How linear weights of this base are stored: by shape, and where a square one cannot tell, by the architecture,
    by the other modules of the adapter, by the adapter's own flag, in this order.
    """
    kinds = {plan.model_type, *(v.get("model_type") for v in plan.config.values() if isinstance(v, dict))}
    conv1d = bool(kinds & CONV1D_MODELS)
    seen = set()
    for name, updates in plan.updates.items():
        shape = view.tensors[name].shape
        for update, _ in updates:
            out, in_ = update.delta.shape
            if update.kind == "linear" and out != in_ and shape in {(out, in_), (in_, out)}:
                seen.add((_is_conv1d(update.module), shape == (in_, out)))

    def turned(update: Update, stored: tuple[int, int]) -> bool:
        if plan.dialect:
            return False
        out, in_ = update.delta.shape
        by_name = _is_conv1d(update.module)
        upright, turned = _fits((out, in_), stored), _fits((in_, out), stored)
        if upright != turned or not upright:
            may = (conv1d and by_name) or update.transposed or not plan.model_type
            return turned and bool(may)
        all_conv1d = plan.model_type in CONV1D_MODELS and not any(isinstance(v, dict) for v in plan.config.values())
        if conv1d and (by_name or not (all_conv1d and update.transposed)):
            return by_name
        if update.told:
            return bool(update.transposed)
        alike = {turn for named, turn in seen if named == by_name}
        if len(alike) == 1 and not conv1d:
            return alike == {True}
        if update.transposed and plan.model_type and not by_name:
            raise FitError(
                f"{update.module} is square, and nothing tells whether the base stores it as (in, out): its config "
                f"says model_type {plan.model_type}, the adapter's says fan_in_fan_out. Set fan_in_fan_out "
                "to what is right for it."
            )
        return bool(update.transposed)

    return turned


def _fits(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether sizes agree, of which -1 are not known."""
    return all(want in (has, -1) for want, has in zip(expected, found, strict=True))


def _is_conv1d(module: str) -> bool:
    return module.rpartition(".")[2] in CONV1D_LAYERS


def _misfit_sentence(update: Update, expected: tuple[int, ...], info: TensorInfo, plan: _Plan) -> str:
    out, in_ = update.delta.shape
    shape, wanted = list(info.shape), list((out, *update.kernel_size) if update.kernel_size else expected)
    return (
        f"{update.module}: the adapter updates a weight of {out} outputs and {in_} inputs, but the base weight in "
        f"{info.file} has shape {shape} (expected {wanted}). Is this the right base model?{plan.trained_on}"
    )
