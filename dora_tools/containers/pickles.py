"""A stack machine for pickles that runs nothing.

A pickle is a program for a small stack machine. Ours pushes plain data only: every global, whatever its name, becomes
an `Inert` record, and a call of one is another record, except for the few names in ``_KNOWN``, which are computed
here. No function that the file names is ever looked up, so none can be called. Tensors become `TensorRecord`s: where
the values lie.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from reprlib import Repr
from typing import Any, ClassVar

from ..dtypes import DTYPES

MAX_COPIES = 1 << 26  # elements that constructors may copy: a few bytes of pickle can ask for it again and again
MAX_EXPANDED = 1 << 30  # what a tensor may take that repeats its values (stride 0) instead of storing them
_DTYPES = {kind.torch: name for name, kind in DTYPES.items() if kind.torch}
_STORAGES = {  # class → stored type (None: no name for it, or untyped) and bytes of one element
    "FloatStorage": ("F32", 4), "DoubleStorage": ("F64", 8), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1), "ComplexFloatStorage": ("C64", 8),
    "ComplexDoubleStorage": (None, 16), "UntypedStorage": (None, 1), "QUInt8Storage": (None, 1),
    "QInt8Storage": (None, 1), "QInt32Storage": (None, 4), "QUInt4x2Storage": (None, 1), "QUInt2x4Storage": (None, 1),
}  # fmt: skip
_PLAIN_TENSORS = {
    "torch.Tensor", "torch._tensor.Tensor", "torch.tensor.Tensor", "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}  # fmt: skip
_REBUILDERS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.storage._load_from_bytes")
brief = Repr().repr  # bounded: the plain repr of a hostile object may take for ever


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes of the file that tensors lie in; ``start`` is not 0 in a view of an old file."""

    key: str
    kind: str
    nbytes: int
    start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """A tensor of the file: offset and strides count elements of ``dtype`` (a stored type) in ``storage``."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def extent(self) -> int:
        """Elements from the first to the last, both included."""
        return sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1 if prod(self.shape) else 0

    @property
    def contiguous(self) -> bool:
        """The values lie row by row, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return not prod(self.shape)
            expected *= size
        return True


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """What the pickle says about something that is not looked up: a class or function, or the object a call gives.

    ``args`` is None for the class or function itself; ``state`` is what ``__setstate__`` would have got, ``items``
    what a list or dict subclass holds. The call of a called object is ``Inert("", "()", (object, *args))``.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] | dict[Any, Any] | None = None

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def makes_tensor(self) -> bool:
        """Made by a function of torch or numpy that makes tensors or arrays, with values or without."""
        arrays = self.module.startswith("numpy.") and self.name == "_reconstruct"
        return self.args is not None and (arrays or self.qualified.startswith(_REBUILDERS))

    @property
    def attributes(self) -> dict[Any, Any]:
        """The object's attributes, as far as its state is a dict of them (or the pair of dicts that slots give)."""
        parts = self.state if type(self.state) is tuple and len(self.state) == 2 else (self.state,)
        return {key: value for part in parts if type(part) is dict for key, value in part.items()}

    def __repr__(self) -> str:
        return printable(f"<{self.qualified:.200}{'' if self.args is None else '(…)'}>")


class Unpickler(pickle._Unpickler):
    """The stack machine. Python's own in C will not do: it resolves EXT opcodes from a cache that no subclass sees,
    takes only types for NEWOBJ, and allocates a memo as large as the largest index in the file."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    dispatch: ClassVar[dict[int, Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, tuple[int, int]] = {}  # key → bytes, bytes of an element
        self._copies = 0

    def line(self) -> str:
        return self.readline()[:-1].decode()

    def find_class(self, module: str, name: str) -> Inert:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        return Inert(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":  # a class, with its source, in old files
            return pid[1]
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside itself that is not a storage")
        kind, key, numel, view = pid[1], pid[2], pid[4], pid[5] if len(pid) == 6 else None
        if not isinstance(kind, Inert) or kind.name not in _STORAGES or type(key) is not str:
            raise pickle.UnpicklingError(f"the storage {brief(key)} has the unknown type {brief(kind)}")
        itemsize = _STORAGES[kind.name][1]
        nbytes = _count(numel) * itemsize
        if self.storages.setdefault(key, (nbytes, itemsize))[0] != nbytes:
            raise pickle.UnpicklingError(f"the storage {brief(key)} is given two sizes")
        if view is None:
            return Storage(key, kind.name, nbytes)
        start, length = _count(view[1]) * itemsize, _count(view[2]) * itemsize
        if start + length > nbytes:
            raise pickle.UnpicklingError(f"a view of the storage {brief(key)} goes beyond its end")
        return Storage(key, kind.name, length, start)

    def _call(self, function: Any, args: Any, kwargs: Any = None) -> Any:
        if not isinstance(function, Inert) or type(args) is not tuple or type(kwargs) not in (dict, type(None)):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        if function.args is not None:
            return Inert("", "()", (function, *args), kwargs or {})
        known = None if kwargs else _KNOWN.get(function.qualified)
        if known is not None:
            self.spend(len(args[0]) if args and isinstance(args[0], (str, bytes, dict, *_SEQUENCES)) else 0)
            made = known(self, *args)
            if made is not NotImplemented:
                return made
        return Inert(function.module, function.name, args, kwargs or {})

    def spend(self, copies: int) -> None:
        self._copies += copies
        if self._copies > MAX_COPIES:
            raise pickle.UnpicklingError("it copies its own parts without end")

    def _push(self, value: Any) -> None:
        self.append(value)  # looked up now: a mark that was popped for the value has replaced it

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert) and target.args is not None and target.state is None:
            target.state = state
        elif type(target) is not dict:  # an OrderedDict's attributes, such as _metadata, are of no use
            raise pickle.UnpicklingError(f"it sets the state of {brief(target)}")

    def _extend(self, kind: Any, values: list[Any]) -> None:
        target: Any = self.stack[-1]
        held: Any = target
        if isinstance(target, Inert) and target.args is not None:
            kind = dict if kind is dict else list
            target.items = kind() if target.items is None else target.items
            held = target.items
        if type(held) is not kind:
            raise pickle.UnpicklingError(f"it adds items to {brief(target)}")
        if kind is list:
            held.extend(values)
        else:
            held.update(_pairs(values) if kind is dict else hashable(values))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses an instruction that torch.save never writes")


_OPCODES: dict[str, Callable[[Unpickler], None]] = {  # every instruction that would call, hash or set something
    "REDUCE": lambda m: m._push(m._call(m.stack.pop(-2), m.stack.pop())),
    "NEWOBJ": lambda m: m._push(m._call(m.stack.pop(-2), m.stack.pop())),
    "NEWOBJ_EX": lambda m: m._push(m._call(m.stack.pop(-3), m.stack.pop(-2), m.stack.pop())),
    "INST": lambda m: m._push(m._call(m.find_class(m.line(), m.line()), tuple(m.pop_mark()))),
    "OBJ": lambda m: m._push((lambda function, *args: m._call(function, args))(*m.pop_mark())),
    "BUILD": Unpickler._build,
    "APPEND": lambda m: m._extend(list, [m.stack.pop()]),
    "APPENDS": lambda m: m._extend(list, m.pop_mark()),
    "SETITEM": lambda m: m._extend(dict, [m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m: m._extend(dict, m.pop_mark()),
    "ADDITEMS": lambda m: m._extend(set, m.pop_mark()),
    "DICT": lambda m: m._push(dict(_pairs(m.pop_mark()))),
    "FROZENSET": lambda m: m._push(frozenset(hashable(m.pop_mark()))),
    "BYTEARRAY8": lambda m: m._push(bytearray(m.read(_count(int.from_bytes(m.read(8), "little"))))),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), Unpickler._refuse),
}
Unpickler.dispatch = Unpickler.dispatch | {getattr(pickle, name)[0]: run for name, run in _OPCODES.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise pickle.UnpicklingError(f"{brief(value)} is no size, offset or stride")
    return value


def hashable(values: Iterable[Any]) -> Iterator[Any]:
    """The values, to be hashed. Hashing a nested tuple recurses in C without any limit, so large ones are refused."""
    for value in values:
        todo, seen = [value], 0
        while todo:
            item = todo.pop()
            if type(item) is tuple:
                seen += len(item)
                if seen > 1000:
                    raise pickle.UnpicklingError("a key of a dictionary or set is too large")
                todo.extend(item)
        yield value


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(hashable(values[::2]), values[1::2], strict=True)


def _dict(machine: Unpickler, items: Any = (), *rest: Any) -> Any:
    pairs = list(items.items()) if type(items) is dict else items
    if rest or type(pairs) not in (list, tuple):
        return NotImplemented
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        return NotImplemented
    return dict(_pairs([value for pair in pairs for value in pair]))


def _bytes(machine: Unpickler, value: Any = b"", encoding: Any = None, *rest: Any) -> Any:
    if type(value) is str and encoding in ("latin1", "latin-1") and not rest:  # bytes, as protocol 2 spells them
        return value.encode("latin-1")
    return value if type(value) is bytes and encoding is None else NotImplemented


def _value(kind: Callable[..., Any], count: int, types: tuple[type, ...]) -> Callable[..., Any]:
    """A constructor of the language, for at most ``count`` arguments of known types."""

    def build(machine: Unpickler, *args: Any) -> Any:
        if len(args) > count or any(type(arg) not in types for arg in args):
            return NotImplemented
        return kind(hashable(args[0])) if kind in (set, frozenset) and args else kind(*args)

    return build


def _tensor(machine: Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = "") -> Any:
    # rest: requires_grad, hooks, and flags that say "read me conjugated" or "negated"
    name = dtype or (_STORAGES[storage.kind][0] if isinstance(storage, Storage) else None)
    if not isinstance(storage, Storage) or name is None or (len(rest) > 2 and rest[2]):
        return NotImplemented
    shape, strides = tuple(map(_count, size)), tuple(map(_count, stride))
    if len(shape) != len(strides) or len(shape) > 64:
        raise pickle.UnpicklingError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    record, itemsize = TensorRecord(storage, _count(offset), shape, strides, name), DTYPES[name].nbytes
    if (record.offset + record.extent) * itemsize > storage.nbytes:
        raise pickle.UnpicklingError(
            f"a tensor of {shape} {name} at element {offset} needs {(record.offset + record.extent) * itemsize} bytes "
            f"of the storage {brief(storage.key)}, which has {storage.nbytes}"
        )
    if prod(shape) * itemsize > max(MAX_EXPANDED, storage.nbytes):
        raise pickle.UnpicklingError(f"a tensor of {shape} {name} would repeat {storage.nbytes} stored bytes")
    return record


def _tensor_v3(m: Unpickler, s: Any, offset: Any, size: Any, stride: Any, g: Any, h: Any, dtype: Any, *r: Any) -> Any:
    name = _DTYPES.get(dtype.name) if isinstance(dtype, Inert) and dtype.module == "torch" else None
    return NotImplemented if name is None else _tensor(m, s, offset, size, stride, g, h, *r, dtype=name)


def _parameter(machine: Unpickler, data: Any, grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    # subclasses of Parameter come here too (a 4-bit weight): what they need beside the data is in their state
    seen = set[int]()
    plain = isinstance(data, TensorRecord) and not holds_tensors(state, seen)
    machine.spend(len(seen))
    return data if plain else NotImplemented


def _from_type(machine: Unpickler, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    # a plain tensor with Python attributes; a true subclass may mean anything by its values
    if not isinstance(kind, Inert) or kind.args is not None or kind.qualified not in _PLAIN_TENSORS:
        return NotImplemented
    return _parameter(machine, machine._call(function, args), state=state)


_SEQUENCES = (list, tuple, set, frozenset)
HOLDERS = (TensorRecord, Storage, Inert, dict, *_SEQUENCES)
_KNOWN: dict[str, Callable[..., Any]] = {
    "builtins.dict": _dict, "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda m, *args: _dict(m, *args[1:]),  # the factory is not needed
    "builtins.set": _value(set, 1, _SEQUENCES), "builtins.frozenset": _value(frozenset, 1, _SEQUENCES),
    "builtins.list": _value(list, 1, _SEQUENCES), "builtins.tuple": _value(tuple, 1, _SEQUENCES),
    "torch.Size": _value(tuple, 1, _SEQUENCES), "builtins.complex": _value(complex, 2, (float,)),
    "builtins.slice": lambda m, *args: _value(slice, 3, (int, type(None)))(m, *args) if args else NotImplemented,
    "builtins.bytes": _bytes, "_codecs.encode": _bytes,
    "builtins.bytearray": lambda m, *args: made if (made := _bytes(m, *args)) is NotImplemented else bytearray(made),
    "copyreg._reconstructor": lambda m, kind, base, value: m._call(kind, () if value is None else (value,)),
    "copyreg.__newobj__": lambda m, kind, *args: m._call(kind, args),
    "copyreg.__newobj_ex__": lambda m, kind, args, kwargs: m._call(kind, args, kwargs),
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3, "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter, "torch._tensor._rebuild_from_type_v2": _from_type,
}  # fmt: skip


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Inert):
        return (value.args, value.kwargs, value.state, value.items)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, _SEQUENCES) else ()


def holds_tensors(value: Any, done: set[int]) -> bool:
    """Whether there is a tensor anywhere inside; if not, ``done`` knows that afterwards."""
    todo, seen = [value], set[int]()
    while todo:
        part = todo.pop()
        if id(part) not in seen and id(part) not in done:
            seen.add(id(part))
            if isinstance(part, TensorRecord | Storage) or (isinstance(part, Inert) and part.makes_tensor):
                return True
            todo.extend(inner for inner in _parts(part) if isinstance(inner, HOLDERS))
    done |= seen
    return False
