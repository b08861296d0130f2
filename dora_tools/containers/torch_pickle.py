"""Files of ``torch.save`` (.bin, .pt, .pth, .ckpt), read without running anything that is in them.

A pickle is a program for a small stack machine. Ours pushes plain data only: every global, whatever its name, becomes
an `Inert` record, and a call of one is another record, except for the few names in ``_KNOWN``, which are computed
here. No function that the file names is ever looked up, so none can be called. Tensors become `TensorRecord`s: where
the values lie, read row by row when they are asked for.
"""

from __future__ import annotations

import io
import pickle
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ClassVar

from ..checkpoint import Span, TensorInfo
from ..dtypes import DTYPES, decode, to_torch
from ..errors import InputError, UnsupportedError
from .source import Source

if TYPE_CHECKING:
    import torch

MAX_PICKLE = 512 << 20  # names, shapes and hyper-parameters; the values of tensors lie elsewhere
MAX_COPIES = 1 << 26  # elements that constructors may copy: a few bytes of pickle can ask for it again and again
MAX_EXPANDED = 1 << 30  # what a tensor may take that repeats its values (stride 0) instead of storing them
MAX_DEPTH, MAX_NAME, MAX_NAMES = 100, 4096, 1_000_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
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


def _printable(text: str) -> str:
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
        return _printable(f"<{self.qualified:.200}{'' if self.args is None else '(…)'}>")


class _Unpickler(pickle._Unpickler):
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
            held.update(_pairs(values) if kind is dict else _keys(values))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses an instruction that torch.save never writes")


_OPCODES: dict[str, Callable[[_Unpickler], None]] = {  # every instruction that would call, hash or set something
    "REDUCE": lambda m: m._push(m._call(m.stack.pop(-2), m.stack.pop())),
    "NEWOBJ": lambda m: m._push(m._call(m.stack.pop(-2), m.stack.pop())),
    "NEWOBJ_EX": lambda m: m._push(m._call(m.stack.pop(-3), m.stack.pop(-2), m.stack.pop())),
    "INST": lambda m: m._push(m._call(m.find_class(m.line(), m.line()), tuple(m.pop_mark()))),
    "OBJ": lambda m: m._push((lambda function, *args: m._call(function, args))(*m.pop_mark())),
    "BUILD": _Unpickler._build,
    "APPEND": lambda m: m._extend(list, [m.stack.pop()]),
    "APPENDS": lambda m: m._extend(list, m.pop_mark()),
    "SETITEM": lambda m: m._extend(dict, [m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m: m._extend(dict, m.pop_mark()),
    "ADDITEMS": lambda m: m._extend(set, m.pop_mark()),
    "DICT": lambda m: m._push(dict(_pairs(m.pop_mark()))),
    "FROZENSET": lambda m: m._push(frozenset(_keys(m.pop_mark()))),
    "BYTEARRAY8": lambda m: m._push(bytearray(m.read(_count(int.from_bytes(m.read(8), "little"))))),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), _Unpickler._refuse),
}
_Unpickler.dispatch = _Unpickler.dispatch | {getattr(pickle, name)[0]: run for name, run in _OPCODES.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise pickle.UnpicklingError(f"{brief(value)} is no size, offset or stride")
    return value


def _keys(values: Iterable[Any]) -> Iterator[Any]:
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
    return zip(_keys(values[::2]), values[1::2], strict=True)


def _dict(machine: _Unpickler, items: Any = (), *rest: Any) -> Any:
    pairs = list(items.items()) if type(items) is dict else items
    if rest or type(pairs) not in (list, tuple):
        return NotImplemented
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        return NotImplemented
    return dict(_pairs([value for pair in pairs for value in pair]))


def _bytes(machine: _Unpickler, value: Any = b"", encoding: Any = None, *rest: Any) -> Any:
    if type(value) is str and encoding in ("latin1", "latin-1") and not rest:  # bytes, as protocol 2 spells them
        return value.encode("latin-1")
    return value if type(value) is bytes and encoding is None else NotImplemented


def _value(kind: Callable[..., Any], count: int, types: tuple[type, ...]) -> Callable[..., Any]:
    """A constructor of the language, for at most ``count`` arguments of known types."""

    def build(machine: _Unpickler, *args: Any) -> Any:
        if len(args) > count or any(type(arg) not in types for arg in args):
            return NotImplemented
        return kind(_keys(args[0])) if kind in (set, frozenset) and args else kind(*args)

    return build


def _tensor(machine: _Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = "") -> Any:
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


def _tensor_v3(m: _Unpickler, s: Any, offset: Any, size: Any, stride: Any, g: Any, h: Any, dtype: Any, *r: Any) -> Any:
    name = _DTYPES.get(dtype.name) if isinstance(dtype, Inert) and dtype.module == "torch" else None
    return NotImplemented if name is None else _tensor(m, s, offset, size, stride, g, h, *r, dtype=name)


def _parameter(machine: _Unpickler, data: Any, grad: Any = None, hooks: Any = None, state: Any = None) -> Any:
    # subclasses of Parameter come here too (a 4-bit weight): what they need beside the data is in their state
    seen = set[int]()
    plain = isinstance(data, TensorRecord) and not _holds_tensors(state, seen)
    machine.spend(len(seen))
    return data if plain else NotImplemented


def _from_type(machine: _Unpickler, function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    # a plain tensor with Python attributes; a true subclass may mean anything by its values
    if not isinstance(kind, Inert) or kind.args is not None or kind.qualified not in _PLAIN_TENSORS:
        return NotImplemented
    return _parameter(machine, machine._call(function, args), state=state)


_SEQUENCES = (list, tuple, set, frozenset)
_HOLDERS = (TensorRecord, Storage, Inert, dict, *_SEQUENCES)
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


def _holds_tensors(value: Any, done: set[int]) -> bool:
    """Whether there is a tensor anywhere inside; if not, ``done`` knows that afterwards."""
    todo, seen = [value], set[int]()
    while todo:
        part = todo.pop()
        if id(part) not in seen and id(part) not in done:
            seen.add(id(part))
            if isinstance(part, TensorRecord | Storage) or (isinstance(part, Inert) and part.makes_tensor):
                return True
            todo.extend(inner for inner in _parts(part) if isinstance(inner, _HOLDERS))
    done |= seen
    return False


class _Namer:
    """Finds the tensors in an object: names are the keys of nested dicts and the indices of lists, with dots between.

    Whatever else holds values of tensors is kept under ``opaque``, never dropped. Pickles can hold cycles and towers
    of shared parts: what is empty is looked at once, and the count, length and depth of names are bounded.
    """

    def __init__(self, root: Any) -> None:
        self.records: dict[str, TensorRecord] = {}
        self.opaque: dict[str, str] = {}
        self._done: set[int] = set()  # ids of what holds no tensor, or is being looked at
        self._walk(root, ())

    def _walk(self, value: Any, path: tuple[str, ...]) -> bool:
        if isinstance(value, TensorRecord):
            return self._add(self.records, path, value)
        if not isinstance(value, dict | list | tuple):
            return _holds_tensors(value, self._done) and self._add(self.opaque, path, _what(value))
        if id(value) in self._done:
            return False
        if len(path) > MAX_DEPTH:
            raise pickle.UnpicklingError(f"its objects are nested more than {MAX_DEPTH} deep")
        self._done.add(id(value))
        found = False
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, _HOLDERS):
                found |= self._walk(part, (*path, key if type(key) is str else brief(key)))
        if found:
            self._done.remove(id(value))
        return found

    def _add(self, where: dict[str, Any], path: tuple[str, ...], value: Any) -> bool:
        if sum(map(len, path)) > MAX_NAME or len(self.records) + len(self.opaque) >= MAX_NAMES:
            raise pickle.UnpicklingError(f"it has more than {MAX_NAMES} tensors, or names beyond {MAX_NAME} characters")
        name = ".".join(path) or "object"
        if name in self.records or name in self.opaque:
            raise pickle.UnpicklingError(f"two of its tensors have the name {brief(name)}")
        name.encode()  # half a surrogate pair in it could not be written anywhere
        where[name] = value
        return True


def _what(value: Any) -> str:
    """A short description of something that holds tensors."""
    if isinstance(value, Storage):
        return f"a bare {value.kind}"
    if not isinstance(value, Inert):
        return f"a {type(value).__name__} of tensors"
    parts = [part for part in value.args or () if isinstance(part, Inert | Storage)]
    kinds = [part.kind if isinstance(part, Storage) else part.qualified for part in parts]
    kinds = kinds[1:] if value.name == "_rebuild_from_type_v2" else kinds  # the first one is a function
    return _printable(f"{value.qualified:.200} of {kinds[0]:.200}" if kinds else f"{value.qualified:.200}")


_scratch = threading.local()


def _read(source: Source, position: int, length: int, keep: bool) -> torch.Tensor:
    """Bytes of the file; in this thread's scratch where nobody keeps them."""
    import torch

    memory = bytearray() if keep else getattr(_scratch, "memory", bytearray())
    if len(memory) < length:
        memory = bytearray(length)
        if not keep and length <= 64 << 20:
            _scratch.memory = memory
    source.readinto(position, memoryview(memory)[:length])
    return torch.frombuffer(memory, dtype=torch.uint8, count=length) if length else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save as a checkpoint.

    ``metadata``: ``object``: everything in the file, as plain values, `TensorRecord`s and `Inert`s; ``opaque``: name →
    what it is, for what holds tensors in a form that is not read; ``aliases``: name → first name of the same values.
    """

    source: Source
    records: Mapping[str, TensorRecord]
    positions: Mapping[str, int]
    metadata: Mapping[str, Any]

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(r.dtype, r.shape, self.source.path.name) for name, r in self.records.items()}

    def named(self, records: Mapping[str, TensorRecord]) -> TorchFile:
        """The same file with other names for its tensors: those that a reader found in ``metadata["object"]``."""
        first: dict[Any, str] = {}
        keys = {name: (self._position(r), r.shape, r.stride, r.dtype) for name, r in records.items() if prod(r.shape)}
        aliases = {name: first[key] for name, key in keys.items() if first.setdefault(key, name) != name}
        return replace(self, records=dict(records), metadata={**self.metadata, "aliases": aliases})

    def _position(self, record: TensorRecord) -> int:
        storage = record.storage
        return self.positions[storage.key] + storage.start + record.offset * DTYPES[record.dtype].nbytes

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) as a (rows, width) tensor. Raises InputError where the file cannot be read."""
        record, info = self.records[name], self.tensors[name]
        start, stop, _ = slice(start, stop).indices(info.rows)
        count, row = max(0, stop - start), info.bytes_of(info.width)
        if record.contiguous:
            raw = _read(self.source, self._position(record) + start * row, count * row, out is None)
        else:
            raw = self._gather(record, start, count, info.width)
        values = decode(raw, info.dtype, out)
        return values.reshape(count, info.width) if out is None else values

    def _gather(self, record: TensorRecord, start: int, count: int, width: int) -> torch.Tensor:
        """Bytes of rows that do not lie one after another; all that lies between the first and the last is read."""
        import torch

        if len(record.shape) < 3:  # only the rows asked for; with more dimensions they are no view of the storage
            offset, shape = record.offset + start * record.stride[0], (count, *record.shape[1:])
            record, start = replace(record, offset=offset, shape=shape), 0
        length = record.extent * DTYPES[record.dtype].nbytes
        values = _read(self.source, self._position(record), length, False).view(to_torch(record.dtype))
        rows = values.as_strided(record.shape, record.stride).reshape(-1, width)[start : start + count]
        return rows.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def span(self, name: str) -> Span | None:
        """Where the tensor lies in the file; None where its values are not one after another."""
        record = self.records[name]
        return Span(self.source.path, self._position(record), self.tensors[name].nbytes) if record.contiguous else None


def open_torch(path: Path, offset: int = 0, length: int | None = None) -> TorchFile:
    """Open a file of torch.save, or the one that lies in ``length`` bytes at ``offset`` of a larger file.

    Raises InputError where it is none, is damaged or contradicts itself; UnsupportedError for what is recognised and
    not read: TorchScript, tar archives, compressed or encrypted members, big-endian data.
    """
    source = Source(path)
    end = source.size if length is None else offset + length
    with _told(path):
        if offset >= end:
            raise InputError(f"{path} is empty, so it is not a file of torch.save. Download or copy it again.")
        head = source.pread(offset, min(512, end - offset))
        if head[257:262] == b"ustar":
            raise UnsupportedError(
                f"{path} is a tar archive, as torch before 0.1.10 and NeMo write them; that is not read. "
                "Unpack it, or load it with the program that wrote it and save it again."
            )
        found, positions = (_open_zip if head[:4] == b"PK\3\4" else _open_stream)(source, offset, end)
        names = _Namer(found)
        return TorchFile(source, {}, positions, {"object": found, "opaque": names.opaque}).named(names.records)


def read_pickle(path: Path) -> Any:
    """What a plain pickle holds (``.metadata`` of a distributed checkpoint), as plain values and `Inert`s.

    Raises InputError where it is none, is damaged or larger than MAX_PICKLE bytes.
    """
    source = Source(path)
    if source.size > MAX_PICKLE:
        raise UnsupportedError(f"{path} has {source.size} bytes; of pickles, at most {MAX_PICKLE} are read.")
    with _told(path):
        return _Unpickler(io.BytesIO(source.pread(0, source.size))).load()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever a hostile file makes Python raise becomes one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, pickle.UnpicklingError | zipfile.BadZipFile) else repr(error)
        raise InputError(
            f"{path} is damaged, or was not written by torch.save: {_printable(why[:300]).rstrip('.')}. "
            "Download or copy it again, or load it where it came from and save its state_dict anew."
        ) from error


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, source: Source, start: int, end: int) -> None:
        self.source, self.start, self.length, self.at = source, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        self.source.readinto(self.start + self.at, view)
        self.at += len(view)
        return len(view)


def _open_zip(source: Source, start: int, end: int) -> tuple[Any, dict[str, int]]:
    with zipfile.ZipFile(io.BufferedReader(_Window(source, start, end))) as archive:
        listed = archive.infolist()
    members = {member.filename: member for member in listed}
    pickles = [name for name in members if name.rsplit("/", 1)[-1] == "data.pkl"]
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in members):
        raise UnsupportedError(
            f"{source.path} is a TorchScript archive: a program, not tensors. Load it with torch.jit.load and save its "
            "state_dict."
        )
    if len(pickles) != 1:
        raise InputError(
            f"{source.path} is a zip archive with {len(pickles)} files named data.pkl, where torch.save writes one. "
            "If something else was zipped, unpack it first."
        )
    for member in listed:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UnsupportedError(
                f"{source.path}: {brief(member.filename)} is compressed or encrypted, which torch.save never does. "
                "Unpack the archive, zip it again without compression (zip -0 -r), or load and save it anew."
            )
        if member.compress_size != member.file_size or member.file_size > end - start:
            raise zipfile.BadZipFile(f"the sizes of {brief(member.filename)} do not fit the file")
        if ".." in member.filename.split("/") or member.filename.startswith(("/", "\\")):
            raise zipfile.BadZipFile(f"{brief(member.filename)} leads out of the archive")
    if len(members) != len(listed):
        raise zipfile.BadZipFile("two of its members have the same name")

    def locate(name: str) -> tuple[int, int]:
        if name not in members:
            raise zipfile.BadZipFile(f"it has no member {brief(name)}")
        member = members[name]
        at = start + member.header_offset
        signature, name_length, extra = struct.unpack("<4s22xHH", source.pread(at, 30))
        stored = source.pread(at + 30, name_length).decode("utf-8" if member.flag_bits & 0x800 else "cp437")
        data = at + 30 + name_length + extra
        if signature != b"PK\3\4" or stored != member.orig_filename or data + member.file_size > end:
            raise zipfile.BadZipFile(f"the local header of {brief(name)} does not fit the directory")
        return data, member.file_size

    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in members:
        at, size = locate(f"{prefix}byteorder")
        order = source.pread(at, min(size, 16))
        if order != b"little":
            raise UnsupportedError(
                f"{source.path} was written on a machine with another byte order ({order!r}, expected 'little'). "
                "Load and save it there on a little-endian machine."
            )
    at, size = locate(pickles[0])
    if size > MAX_PICKLE:
        raise UnsupportedError(f"{source.path}: {brief(pickles[0])} has {size} bytes; at most {MAX_PICKLE} are read.")
    data = source.pread(at, size)
    if members[pickles[0]].CRC not in (0, zlib.crc32(data)):  # 0: torch.serialization.set_crc32_options(False)
        raise zipfile.BadZipFile(f"the checksum of {brief(pickles[0])} is wrong")
    machine = _Unpickler(io.BytesIO(data))
    found = machine.load()
    positions = {}
    for key, (nbytes, _) in machine.storages.items():
        positions[key], size = locate(f"{prefix}data/{key}")
        if size != nbytes:
            raise zipfile.BadZipFile(f"{brief(prefix + 'data/' + key)} has {size} bytes, but its tensors need {nbytes}")
    return found, positions


def _open_stream(source: Source, start: int, end: int) -> tuple[Any, dict[str, int]]:
    """torch < 1.6: magic, version, system, object, storage keys as pickles; then each storage after its length."""
    file = io.BufferedReader(_Window(source, start, min(end, start + MAX_PICKLE)), 1 << 16)
    try:
        magic = _Unpickler(file).load()
    except InputError:
        raise
    except Exception:
        magic = None
    if magic != _MAGIC:
        raise InputError(
            f"{source.path} is not a file of torch.save: neither a zip archive nor the older stream of pickles. "
            "Is it the right file, and complete?"
        )
    version, system, machine = _Unpickler(file).load(), _Unpickler(file).load(), _Unpickler(file)
    if version != _PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise UnsupportedError(
            f"{source.path} has protocol {brief(version)} and system {brief(system)}; expected {_PROTOCOL} and "
            "little_endian True. Load it where it was written and save it with a newer torch."
        )
    found = machine.load()
    keys = _Unpickler(file).load()
    if type(keys) is not list or len(keys) != len(machine.storages) or {*_keys(keys)} != machine.storages.keys():
        raise pickle.UnpicklingError("the list of its storages does not match those its tensors lie in")
    at, positions = start + file.tell(), {}
    for key in keys:
        nbytes, itemsize = machine.storages[key]
        numel = int.from_bytes(source.pread(at, 8), "little", signed=True)
        if numel * itemsize != nbytes or at + 8 + nbytes > end:
            raise pickle.UnpicklingError(f"the storage {brief(key)} has {numel} elements and {nbytes} bytes at {at}")
        positions[key] = at + 8
        at += 8 + nbytes
    return found, positions
