"""Which of a table's layouts each module has, by its shapes and its base weight; square ones never by chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...checkpoint import Checkpoint, Ref, ref, tiles
from ...errors import InputError, UnsupportedError
from ...names.places import found
from ...names.ties import CONV1D_LAYERS, CONV1D_MODELS, EMBEDDING_NAME
from .keys import Module, Reader
from .shapes import Equation, determined, labels, solve
from .syntax import SHAPED, Shape


def find_weights(reader: Reader, modules: Sequence[Module]) -> None:
    """The base weights of the modules: from the same file, or from the base that the user gave, where it matters."""
    wanted = len(reader.table.layouts) > 1 or reader.table.refuse
    outside: dict[str, Ref] = {}
    if wanted and reader.given.base and not all("base" in module.keys for module in modules):
        weights, biases = ([f"{module.path}.{part}" for module in modules] for part in ("weight", "bias"))
        outside = found(reader.given.base(), weights, biases)
    for module in modules:
        own = module.keys.get("base")
        module.weight = ref(reader.checkpoint, own[0]) if own else outside.get(f"{module.path}.weight")
        module.biased = "bias" in module.keys or f"{module.path}.bias" in outside


def measure(reader: Reader, module: Module) -> None:
    """Choose the layout that the shapes fit. What the table refuses by shape is refused with its reason."""
    possible = []
    for layout in reader.table.layouts:
        if layout.kind == "embedding" and (module.biased or module.path.rpartition(".")[2] in CONV1D_LAYERS):
            continue  # a linear layer that is stored (in, out)
        sizes = solve(_equations(reader, module, layout), {})
        if sizes is not None and (layout.kind != "conv" or module.weight is None or len(module.weight.shape) > 2):
            possible.append((layout, sizes))
    shaped = [role for role in ("lora_A", "lora_B", "magnitude") if role in module.keys]
    certain = [
        (layout, sizes) for layout, sizes in possible if determined((layout.dims.get(r, ()) for r in shaped), sizes)
    ]
    if not certain:
        raise _misfit(reader, module)
    module.layout, module.sizes = certain[0]
    turned = {layout.stored_in_out for layout, _ in certain if layout.kind != "conv" and layout.square}
    module.square = module.weight is not None and len(turned) > 1
    rivals = [layout for layout, _ in possible if layout is not module.layout]
    # a convolution taken for a linear layer fits no loader; an embedding would be dropped by some without a word
    if module.weight is None and any(layout.kind != "conv" for layout in rivals) and not reader.doubt:
        others = " or ".join(dict.fromkeys(_spelled(layout) for layout in rivals))
        reader.doubt = (
            f"{module.path} (and maybe others) is read as {_spelled(module.layout)}, but a file of this format does "
            f"not say whether it is {others}: --base tells."
        )


def _spelled(layout: Shape) -> str:
    fused = any("parts" in labels(dim) for dim in layout.dims.get("lora_A", ()))
    if layout.kind == "linear" and (fused or layout.stored_in_out):
        return "part of a fused layer" if fused else "a linear layer stored (in, out)"
    return {"linear": "a linear layer", "embedding": "an embedding", "conv": "a convolution"}.get(layout.kind, "")


def _equations(reader: Reader, module: Module, layout: Shape) -> list[Equation]:
    found: list[Equation] = []
    for role in SHAPED:
        dims = layout.dims.get(role, ())
        shape = module.weight.shape if role == "base" and module.weight else None
        if shape is None and role in module.keys:
            shape = reader.shape(role, module)
        if shape is not None and dims and not (role == "bias" and layout.kind == "embedding"):
            found.append((shape, dims))
    return found


def _misfit(reader: Reader, module: Module) -> InputError:
    """Which tensor does not fit, by the first layout, and what the others of its module say."""
    table, first = reader.table, reader.table.layouts[0]
    for refused, dims, reason in table.refuse:
        if refused in module.keys:
            as_refused = Shape(first.kind, {**first.dims, refused: dims})
            if solve(_equations(reader, module, as_refused), {}):
                shape = list(reader.shape(refused, module))
                return UnsupportedError(f"{module.keys[refused][0]} has shape {shape}: {reason}")
    if len(table.layouts) > 1:
        shapes = [f"{key} {list(reader.checkpoint.tensors[key].shape)}" for key, rule in module.keys.values()]
        weight = f", with a base weight of {list(module.weight.shape)}" if module.weight else ""
        return InputError(
            f"{module.path}: {', '.join(shapes)}{weight}: this fits no layer that format '{table.name}' knows. Is this "
            "the right base, and is the convolution one without groups?"
        )
    equations: list[Equation] = []
    sizes: dict[str, int] = {}
    for role in SHAPED:
        wanted = first.dims.get(role)
        if role in module.keys and wanted:
            equations.append((reader.shape(role, module), wanted))
            fitting = solve(equations, {})
            if fitting is None:
                known = ", ".join(f"{label} = {n}" for label, n in sizes.items() if label != "1")
                return InputError(
                    f"{module.keys[role][0]} has shape {list(reader.shape(role, module))}, but format '{table.name}' "
                    f"has ({', '.join(wanted)}) there, and the other tensors of {module.path} say {known}."
                )
            sizes = fitting
    return InputError(f"{module.path}: its shapes do not say what format '{table.name}' needs to know; say --base.")


def decide_orientation(reader: Reader, modules: Sequence[Module]) -> None:
    """Which way square weights are stored, where a table allows both: by what the base says of itself, by the other
    layers of the file if they agree, by the user; never by chance.
    """
    for module in modules:
        assert module.layout is not None
        if module.weight is not None or len(reader.table.layouts) == 1:
            module.turned = module.layout.stored_in_out or (False if len(reader.table.layouts) > 1 else None)
    doubtful = [module for module in modules if module.square]
    if not doubtful:
        return
    config = (reader.given.base().metadata.get("config") if reader.given.base else None) or {}
    kind = config.get("model_type")
    others = {m.turned for m in modules if not m.square and m.layout and m.layout.kind == "linear"}
    for module in doubtful:
        assert module.layout is not None
        assert module.weight is not None
        last = module.path.rpartition(".")[2]
        named = (kind in CONV1D_MODELS and last in CONV1D_LAYERS) or bool(EMBEDDING_NAME.search(last))
        vocabular = config.get("vocab_size") == module.weight.shape[0]
        embedding = any(layout.kind == "embedding" for layout in reader.table.layouts) and not module.biased
        if embedding and EMBEDDING_NAME.search(last):
            module.turned = True
        elif reader.given.fan_in_fan_out is not None:
            module.turned = reader.given.fan_in_fan_out
        elif isinstance(kind, str) and not vocabular:
            module.turned = named
        elif len(others) == 1 and not embedding:
            module.turned = others == {True}
            way = "(in, out)" if module.turned else "(out, in)"
            reader.notes.append(f"{module.path} is square; it is taken to be stored {way}, as the other layers are.")
        else:
            raise InputError(
                f"{module.path} is square, so its shape does not tell whether the base stores it as (out, in) like "
                "nn.Linear, or as (in, out) like an embedding or a Conv1D. Say --no-fan-in-fan-out or "
                "--fan-in-fan-out, which is then so for all square layers that are not named like embeddings."
            )
        fitting = [
            s for s in reader.table.layouts if s.stored_in_out == module.turned and s.kind != "conv" and s.square
        ]
        sized = [(s, n) for s in fitting if (n := solve(_equations(reader, module, s), {})) is not None]
        module.layout, module.sizes = sized[0]


def decide_square(reader: Reader, modules: Sequence[Module]) -> None:
    """Where inputs and outputs are equally many, a refused shape looks like a good one: decide once for the file."""
    table = reader.table
    for role, dims, reason in table.refuse:
        doubtful = []
        for module in modules:
            if role in module.keys:
                doubtful.append(module)
                if not solve([(reader.shape(role, module), dims)], module.sizes):
                    return  # this one can only be what the table reads, and a file is of one kind
        if not doubtful or reader.given.magnitude_axis is not None:
            return
        if _look_like_norms(doubtful[:4], role, reader.checkpoint):
            reader.notes.append(
                f"All layers are square; the {role}s match the norms of the base's columns, so they are those."
            )
            return
        raise InputError(
            f"All layers are square, so {doubtful[0].keys[role][0]} may be what '{table.name}' stores, or: {reason} "
            "With --base the norms of its columns may tell; if it is one magnitude for each input, say "
            "--magnitude-axis in."
        )


def _look_like_norms(modules: Iterable[Module], role: str, checkpoint: Checkpoint) -> bool:
    """Whether the magnitudes are nearer to the column norms of the base weights than to ones, clearly.

    DoRA's begin as those norms, the other layer's as ones, and training moves either only a little.
    """
    from_norms = from_ones = 0.0
    for module in modules:
        if module.weight is None or module.weight.origin is None:
            return False
        m = ref(checkpoint, module.keys[role][0]).load().flatten()
        base, name = module.weight.origin, module.weight.key
        squares = [base.read(name, *rows).square().sum(0) for rows in tiles(base.tensors[name])]
        norms = sum(squares[1:], start=squares[0]).sqrt()
        from_norms += float((m - norms).abs().mean())
        from_ones += float((m - 1).abs().mean())
    return from_norms < 0.5 * from_ones
