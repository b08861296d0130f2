"""Files of ``torch.save`` (.bin, .pt, .pth, .ckpt), read without running anything that is in them.

`pickles` makes plain data of the program in the file; here its tensors get names, and their values are read row by row
when they are asked for.
"""

from __future__ import annotations

import io
import pickle
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Span, TensorInfo
from ..dtypes import DTYPES, decode, to_torch
from ..errors import InputError, UnsupportedError
from .pickles import HOLDERS, Inert, Storage, TensorRecord, Unpickler, brief, hashable, holds_tensors, printable
from .source import Source

if TYPE_CHECKING:
    import torch

MAX_PICKLE = 512 << 20  # names, shapes and hyper-parameters; the values of tensors lie elsewhere
MAX_DEPTH, MAX_NAME, MAX_NAMES = 100, 4096, 1_000_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


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
            return holds_tensors(value, self._done) and self._add(self.opaque, path, _what(value))
        if id(value) in self._done:
            return False
        if len(path) > MAX_DEPTH:
            raise pickle.UnpicklingError(f"its objects are nested more than {MAX_DEPTH} deep")
        self._done.add(id(value))
        found = False
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, HOLDERS):
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
    return printable(f"{value.qualified:.200} of {kinds[0]:.200}" if kinds else f"{value.qualified:.200}")


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
        metadata: dict[str, Any] = {"object": found}
        if isinstance(found, Inert) and "_modules" in found.attributes:
            found, metadata["attributes"] = _state_dict(found)
            metadata["whole_module"] = True
        elif isinstance(found, dict):
            found, metadata = _with_states(found, metadata)
        names = _Namer(found)
        return TorchFile(source, {}, positions, {**metadata, "opaque": names.opaque}).named(names.records)


def _with_states(found: dict[Any, Any], metadata: dict[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """A dictionary with modules in it (``{"model": net}``): each as its state dict, with its attributes beside."""
    attributes: dict[str, Any] = {}
    states: dict[Any, Any] = {}
    for key, value in found.items():
        if isinstance(key, str) and isinstance(value, Inert) and "_modules" in value.attributes:
            states[key], own = _state_dict(value)
            attributes |= {f"{key}.{path}" if path else key: held for path, held in own.items()}
    return (
        ({**found, **states}, {"object": {**found, **states}, "attributes": attributes})
        if states
        else (found, metadata)
    )


def _state_dict(module: Inert) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Of a pickled nn.Module: parameters and buffers by name, and each submodule's plain attributes by its path.

    The attributes are all that is left of what the class computed with: a rank, an alpha.
    """
    tensors: dict[str, Any] = {}
    attributes: dict[str, dict[str, Any]] = {}
    todo: list[tuple[str, Any, int]] = [("", module, 0)]
    while todo:
        path, part, depth = todo.pop()
        held = part.attributes if isinstance(part, Inert) else {}
        if depth > MAX_DEPTH or len(attributes) > MAX_NAMES:
            raise pickle.UnpicklingError("its modules are nested without end")
        attributes[path] = {k: v for k, v in held.items() if isinstance(v, str | int | float)}
        prefix = f"{path}." if path else ""
        for kind in ("_parameters", "_buffers"):
            values = held.get(kind)
            for name, value in values.items() if isinstance(values, dict) else ():
                if value is not None:
                    tensors[f"{prefix}{name}"] = value
        children = held.get("_modules")
        todo += (
            [(f"{prefix}{k}", v, depth + 1) for k, v in children.items()][::-1] if isinstance(children, dict) else []
        )
    return tensors, attributes


def read_pickle(path: Path) -> Any:
    """What a plain pickle holds (``.metadata`` of a distributed checkpoint), as plain values and `Inert`s.

    Raises InputError where it is none, is damaged or larger than MAX_PICKLE bytes.
    """
    source = Source(path)
    if source.size > MAX_PICKLE:
        raise UnsupportedError(f"{path} has {source.size} bytes; of pickles, at most {MAX_PICKLE} are read.")
    with _told(path):
        return Unpickler(io.BytesIO(source.pread(0, source.size))).load()


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
            f"{path} is damaged, or was not written by torch.save: {printable(why[:300]).rstrip('.')}. "
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
    machine = Unpickler(io.BytesIO(data))
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
        magic = Unpickler(file).load()
    except InputError:
        raise
    except Exception:
        magic = None
    if magic != _MAGIC:
        raise InputError(
            f"{source.path} is not a file of torch.save: neither a zip archive nor the older stream of pickles. "
            "Is it the right file, and complete?"
        )
    version, system, machine = Unpickler(file).load(), Unpickler(file).load(), Unpickler(file)
    if version != _PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise UnsupportedError(
            f"{source.path} has protocol {brief(version)} and system {brief(system)}; expected {_PROTOCOL} and "
            "little_endian True. Load it where it was written and save it with a newer torch."
        )
    found = machine.load()
    keys = Unpickler(file).load()
    if type(keys) is not list or len(keys) != len(machine.storages) or {*hashable(keys)} != machine.storages.keys():
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
