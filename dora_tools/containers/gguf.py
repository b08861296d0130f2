"""GGUF files, whole or split: read by row ranges, and laid out with the metadata's bytes as they stand.

The file is parsed here and not by the gguf package, whose reader makes an array of every token of the vocabulary (20 s
and 700 MB for 262 k of them) and hangs or overflows on malformed files. Every length is checked against what is left
of the file before it is used; vocabularies are walked over, never decoded.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, Span, TensorInfo
from ..dtypes import DTYPES, GGML
from ..errors import InputError, UnsupportedError
from ..layout import Computed, File, Piece
from .source import Source, Stored

MAGIC = b"GGUF"
_ARRAY, _STRING = 9, 8
# KV type → struct format; strings and arrays have a length of their own
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHUNK = 1 << 20
_SMALL = 1 << 16  # strings of up to so many bytes are kept as values
_ITEMS = 1 << 12  # and arrays of so many numbers: one for each block of a model
_MAX_ALIGNMENT = 1 << 20
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

Value = bool | int | float | str | tuple[Any, ...]


@dataclass(frozen=True)
class Header:
    """The head of one file: where its metadata's bytes lie, and of small values what they say and where.

    ``values``: key → number, string or tuple; what is large (a vocabulary) is missing. ``places``: key → (KV type,
    offset of the value in the file). ``offsets``: where each tensor's data begin; ``types``: what it is stored as.
    """

    path: Path
    version: int
    count: int
    kv: Span
    values: Mapping[str, Value]
    places: Mapping[str, tuple[int, int]]
    offsets: Mapping[str, int]
    types: Mapping[str, str]

    def digest(self) -> str:
        """SHA-256 of the metadata's bytes."""
        return hashlib.sha256(Source(self.path).pread(self.kv.offset, self.kv.length)).hexdigest()

    @property
    def alignment(self) -> int:
        return int(self.values.get("general.alignment", 32))  # type: ignore[arg-type]


class GgufCheckpoint(Stored):
    """One file, or all files of a split, as a Checkpoint. Keys of ``metadata``: ``gguf`` (headers by file name)."""

    def __init__(self, files: Sequence[Path], metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        headers: dict[str, Header] = {}
        for path in files:
            source = Source(path)
            header, tensors = _Parser(source, path).parse()
            for name in self.tensors.keys() & tensors.keys():
                raise InputError(f"{path} holds {name}, which is in {self.tensors[name].file} too.")
            self.add(source, tensors, header.offsets)
            headers[path.name] = header
        self.metadata = {**(metadata or {}), "gguf": headers}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, or says that it is one."""
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def models(paths: Iterable[Path]) -> list[Path]:
    """Of GGUF files those that stand for a model: of a split the first, without projectors (mmproj) beside a model."""
    return [
        path
        for path in paths
        if not path.name.startswith("mmproj") and ((match := _SPLIT.fullmatch(path.name)) is None or int(match[2]) == 1)
    ]


def open_gguf(path: Path, metadata: Mapping[str, Any] | None = None) -> GgufCheckpoint:
    """A file with all files of its split. Raises InputError where one is missing or is none of them."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        checkpoint = GgufCheckpoint([path], metadata)
        parts = checkpoint.metadata["gguf"][path.name].values.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise InputError(
                f"{path} is one of {parts} files of a split model, but its name does not say which: they are named "
                "NAME-00001-of-0000N.gguf."
            )
        return checkpoint
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise InputError(f"{path} says that it is file {int(match[2])} of {count}.")
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(f"{path} is one of {count} files, and {len(missing)} are not there: {', '.join(missing[:3])}.")
    checkpoint = GgufCheckpoint(paths, metadata)
    for number, part in enumerate(paths):
        values = checkpoint.metadata["gguf"][part.name].values
        if (values.get("split.no", 0), values.get("split.count", 1)) != (number, count):
            raise InputError(f"{part} does not say that it is file {number + 1} of {count}: are they of one model?")
        told = values.get("split.tensors.count", len(checkpoint.tensors))
        if told != len(checkpoint.tensors):
            raise InputError(
                f"{part} says that the model has {told} tensors, and its files hold {len(checkpoint.tensors)}."
            )
    return checkpoint


class _Parser:
    """Walks over the head of a file once, a chunk at a time."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source, self._path = source, path
        self._at = 0  # in the file
        self._buffer, self._start = b"", 0

    def parse(self) -> tuple[Header, dict[str, TensorInfo]]:
        if self._source.size < 24:
            raise self._bad("it is shorter than a header" if self._source.size else "it is empty")
        start = self._take(4)
        if start == b"vers":
            raise InputError(
                f"{self._path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from."
            )
        if start != MAGIC:
            raise self._bad(f"it does not begin with {MAGIC.decode()}")
        (version,) = self._unpack("I")
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(f"{self._path} is a big-endian GGUF file, which dora-tools does not read.")
        if version not in (2, 3):
            raise UnsupportedError(f"{self._path} is of GGUF version {version}; dora-tools reads 2 and 3.")
        tensors, count = self._unpack("QQ")
        self._enough(count, 13, "metadata entries")
        self._enough(tensors, 25, "tensors")
        self._few(count, 1 << 16, "metadata entries")
        self._few(tensors, 1 << 17, "tensors")
        begin = self._at
        values: dict[str, Value] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            key = self._name("metadata key")
            if key in places:
                raise self._bad(f"the metadata key {key!r} stands twice")
            (kind,) = self._unpack("I")
            places[key] = kind, self._at
            value = self._value(key, kind)
            if value is not None:
                values[key] = value
        if not isinstance(values.get("general.architecture"), str) and "split.no" not in values:
            raise self._bad("it has no general.architecture, so nobody could run it")
        end = self._at
        header = Header(self._path, version, count, Span(self._path, begin, end - begin), values, places, {}, {})
        alignment = values.get("general.alignment", None if "general.alignment" in places else 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {alignment!r}, not a power of two")
        infos, offsets = self._tensors(tensors)
        data = -(-self._at // alignment) * alignment
        self._check_data(infos, offsets, data, alignment)
        types = {name: info.dtype for name, info in infos.items()}
        return replace(header, offsets={name: data + at for name, at in offsets.items()}, types=types), infos

    def _tensors(self, count: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        infos: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = self._name("tensor name", 64)
            if name in infos:
                raise self._bad(f"the tensor {name} stands twice")
            (dims,) = self._unpack("I")
            if not 1 <= dims <= 4:
                raise self._bad(f"{name} has {dims} dimensions; 1 to 4 are possible")
            shape = self._unpack(f"{dims}Q")[::-1]
            number, offset = self._unpack("IQ")
            if number not in GGML:
                raise self._bad(f"{name} is of type {number}, which ggml does not have or no longer has")
            kind = DTYPES[GGML[number]]
            if 0 in shape or prod(shape) >= 1 << 62:
                raise self._bad(f"{name} has the impossible shape {list(shape)}")
            if shape[-1] % kind.block:
                raise self._bad(
                    f"{name} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {kind.block}"
                )
            width = shape[0] if len(shape) == 1 and kind.block > 1 else 0
            infos[name] = TensorInfo(kind.name, tuple(shape), self._path.name, width)
            offsets[name] = offset
        return infos, offsets

    def _check_data(
        self, infos: Mapping[str, TensorInfo], offsets: Mapping[str, int], data: int, alignment: int
    ) -> None:
        end = 0
        for name in sorted(infos, key=offsets.__getitem__):
            offset, size = offsets[name], infos[name].nbytes
            if offset % alignment:
                raise self._bad(f"{name} begins at {offset}, not a multiple of the alignment of {alignment}")
            if offset + size > self._source.size - data:
                raise self._bad(
                    f"{name} needs {size} bytes at {data + offset}, and the file ends at {self._source.size}: it was "
                    "cut off, or its header lies"
                )
            if offset < end:
                raise self._bad(f"{name} overlaps the tensor before it")
            end = offset + size

    def _value(self, key: str, kind: int) -> Value | None:
        """The value here, which is walked over; None if it is large."""
        if kind in _SCALARS:
            value: Value = self._unpack(_SCALARS[kind])[0]
            return value
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            raise self._bad(f"{key} is of type {kind}, which GGUF does not have")
        item, count = self._unpack("IQ")
        if item in _SCALARS:
            size = struct.calcsize(_SCALARS[item])
            self._enough(count, size, f"items of {key}")
            if count > _ITEMS:
                self._skip(count * size)
                return None
            return self._unpack(f"{count}{_SCALARS[item]}")
        if item != _STRING:
            raise self._bad(f"{key} is an array of type {item}, which dora-tools does not read")
        self._enough(count, 8, f"strings of {key}")
        self._few(count, 1 << 24, f"strings of {key}")
        for _ in range(count):
            self._skip(self._length(key))
        return None

    def _length(self, what: str) -> int:
        length: int = self._unpack("Q")[0]
        self._enough(length, 1, f"bytes of {what}")
        return length

    def _text(self, what: str) -> str | None:
        length = self._length(what)
        if length > _SMALL:
            self._skip(length)
            return None
        return self._take(length).decode(errors="replace")

    def _name(self, what: str, limit: int = _SMALL) -> str:
        length = self._length(what)
        if not 0 < length < limit:
            raise self._bad(f"a {what} at {self._at} is {length} bytes long; 1 to {limit - 1} are possible")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._bad(f"a {what} before {self._at} is not UTF-8") from error

    def _enough(self, count: int, size: int, what: str) -> None:
        left = self._source.size - self._at
        if count * size > left:
            raise self._bad(f"it announces {count} {what} at {self._at}, where {left} bytes are left")

    def _few(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise self._bad(f"it announces {count} {what}, more than any model has")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _take(self, count: int) -> bytes:
        at = self._at - self._start
        if at < 0 or at + count > len(self._buffer):
            if self._at + count > self._source.size:
                raise self._bad(f"its header ends in the middle, at {self._source.size}: it was cut off")
            self._start, at = self._at, 0
            self._buffer = self._source.pread(self._at, min(max(_CHUNK, count), self._source.size - self._at))
        self._at += count
        return self._buffer[at : at + count]

    def _skip(self, count: int) -> None:
        self._at += count

    def _bad(self, why: str) -> InputError:
        why = why if len(why) < 400 else f"{why[:200]} … {why[-200:]}"  # names can be long
        return InputError(f"{self._path} is not a complete GGUF file: {why}. Download or convert it again.")


def lay_out(
    checkpoint: Checkpoint,
    *,
    dtypes: Mapping[str, str] | None = None,
    file: str | None = None,
    file_type: int | None = None,
) -> list[File]:
    """The files of a GGUF output: each with the base's metadata, byte for byte, and tensors in the base's order.

    ``dtypes``: which tensors change their stored type. general.file_type is corrected in place where it has become
    false (to ``file_type``, or to what most of the weights are), as is the number of tensors of a split. ``file``
    names the output, or with a split its beginning.
    """
    headers: Mapping[str, Header] = checkpoint.metadata["gguf"]
    now = {name: replace(info, dtype=(dtypes or {}).get(name, info.dtype)) for name, info in checkpoint.tensors.items()}
    patches = {"split.tensors.count": len(now)}
    before = {name: kind for header in headers.values() for name, kind in header.types.items()}
    changed = any(before.get(name) != info.dtype for name, info in now.items())
    kind = file_type if file_type is not None else _file_type(now) if changed else None
    if kind is not None:
        patches["general.file_type"] = kind
    files = []
    for number, (path, header) in enumerate(headers.items(), 1):
        infos = {name: info for name, info in now.items() if info.file == path}
        pieces: list[Piece] = [_start(header.version, len(infos), header.count), *_patched(header, patches)]
        pieces += _data(checkpoint, infos, 24 + header.kv.length, header.alignment)
        name = path
        if file is not None:
            stem = file.removesuffix(".gguf")
            name = file if len(headers) == 1 else f"{stem}-{number:05d}-of-{len(headers):05d}.gguf"
        files.append(File(name, tuple(pieces)))
    return files


def lay_out_new(checkpoint: Checkpoint, values: Mapping[str, Value], file: str) -> File:
    """A GGUF file with metadata of its own: strings, booleans, numbers (int as u32, float as f32) and u32 arrays."""
    kv = b"".join(_string(key) + _encoded(value) for key, value in values.items())
    pieces: list[Piece] = [_start(3, len(checkpoint.tensors), len(values)) + kv]
    pieces += _data(checkpoint, checkpoint.tensors, 24 + len(kv), 32)
    return File(file, tuple(pieces))


def _start(version: int, tensors: int, count: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, tensors, count)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encoded(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, tuple):
        return struct.pack(f"<IIQ{len(value)}I", _ARRAY, 4, len(value), *value)
    kind = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack("<I" + _SCALARS[kind], kind, value)


def _patched(header: Header, patches: Mapping[str, int]) -> Iterable[Piece]:
    """The metadata's bytes with some 32-bit integers replaced."""
    at, end = header.kv.offset, header.kv.offset + header.kv.length
    wanted = {
        header.places[key][1]: value
        for key, value in patches.items()
        if key in header.places and header.places[key][0] in (4, 5) and header.values.get(key) != value
    }
    for offset in sorted(wanted):
        yield Span(header.path, at, offset - at)
        yield struct.pack("<I", wanted[offset])
        at = offset + 4
    if end > at:
        yield Span(header.path, at, end - at)


def _data(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], start: int, alignment: int) -> Iterable[Piece]:
    """Tensor infos and data; ``start`` is where the infos begin in the file."""
    offset, heads = 0, []
    for name, info in infos.items():
        raw = name.encode()
        heads.append(struct.pack("<Q", len(raw)) + raw)
        shape = info.shape[::-1] or (1,)
        heads.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, DTYPES[info.dtype].ggml, offset))
        offset += info.nbytes + -info.nbytes % alignment
    head = b"".join(heads)
    yield head + bytes(-(start + len(head)) % alignment)
    for name, info in infos.items():
        span = checkpoint.span(name) if info.dtype == checkpoint.tensors[name].dtype else None
        yield span or Computed(name, info.dtype, info.nbytes)
        if -info.nbytes % alignment:
            yield bytes(-info.nbytes % alignment)


# llama.cpp's general.file_type for a file that is mostly of one type
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip


def _file_type(tensors: Mapping[str, TensorInfo]) -> int | None:
    """The file type that the matrices make true: that of the type which most of their elements have."""
    elements: dict[str, int] = {}
    for info in tensors.values():
        if len(info.shape) > 1:
            elements[info.dtype] = elements.get(info.dtype, 0) + info.numel
    most = max(elements, key=elements.__getitem__, default="")
    return FILE_TYPES.get(most)
