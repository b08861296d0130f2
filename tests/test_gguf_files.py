"""The GGUF container against the gguf package and against bytes made by hand: hostile heads, rows, layouts, splits."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dora_tools.checkpoint import Checkpoint, Tensors, arranged, constant
from dora_tools.cli import main
from dora_tools.containers import lay_out, open_checkpoint
from dora_tools.dtypes import DTYPES, GGML, GGUF_WRITES, LIBGGUF_WRITES, encode
from dora_tools.errors import DoraToolsError, InputError, UnsupportedError, UsageError
from dora_tools.layout import Layout
from dora_tools.write import write

from . import tiny

Array = NDArray[Any]

# --- bytes by hand ---------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
HUGE = 2**64 - 1


def text(content: str | bytes, length: int | None = None) -> bytes:
    raw: bytes = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def kv(key: str | bytes, kind: int, value: Any) -> bytes:
    """One metadata entry; a value given as bytes stands as it is."""
    if isinstance(value, str):
        value = text(value)
    packed: bytes = value if isinstance(value, bytes) else struct.pack("<" + FORMATS[kind], value)
    return text(key) + struct.pack("<I", kind) + packed


def array(item: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + items


def entry(name: str | bytes, ne: Sequence[int], kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    """One tensor info, with dimensions in ggml's order."""
    count = len(ne) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", count, *ne, kind, offset)


ARCH = kv("general.architecture", STRING, "llama")


def gguf_bytes(
    kvs: Sequence[bytes] = (ARCH,),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    start: bytes | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. ``start``: its first 24 bytes, else those that are true."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(kvs)) if start is None else start
    head += b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def begin(version: int = 3, tensors: int = 0, kvs: int = 1, magic: bytes = b"GGUF", order: str = "<") -> bytes:
    return magic + struct.pack(f"{order}IQQ", version, tensors, kvs)


def with_kv(*more: bytes) -> bytes:
    return gguf_bytes([ARCH, *more])


def with_tensors(*entries: bytes, data: int = 256, kvs: Sequence[bytes] = (ARCH,)) -> bytes:
    return gguf_bytes(kvs, entries, bytes(data))


def aligned(kind: int, value: Any) -> bytes:
    return with_tensors(entry("a", [8]), kvs=[ARCH, kv("general.alignment", kind, value)])


def hundred(content: bytes) -> bytes:
    return content[:100] + bytes(max(0, 100 - len(content)))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 98362432\n"
GIGABYTE = 2**30

# name → (bytes, what is said about them)
MALFORMED: dict[str, tuple[bytes, str]] = {
    # the whole file
    "empty": (b"", "empty"),
    "23 bytes": (gguf_bytes()[:23], "shorter than a header"),
    "html": (b"<!DOCTYPE html><html><body>404 not found, go away</body></html>", "does not begin with GGUF"),
    "git-lfs pointer": (LFS, "GGUF|Git LFS"),
    "bad magic": (gguf_bytes(start=begin(magic=b"GGUE")), "does not begin with GGUF"),
    "old magic ggjt": (gguf_bytes(start=begin(magic=b"tjgg")), "does not begin with GGUF"),
    "version 1": (gguf_bytes(start=begin(1)), "version 1"),
    "version 4": (gguf_bytes(start=begin(4)), "version 4"),
    "version 2^31": (gguf_bytes(start=begin(2**31 + 1)), f"version {2**31 + 1}"),
    "big-endian": (gguf_bytes(start=begin(order=">")), "big-endian"),
    "big-endian version 2": (gguf_bytes(start=begin(2, order=">")), "big-endian"),
    # counts and lengths
    "n_kv 2^64-1": (gguf_bytes(start=begin(kvs=HUGE)), "announces"),
    "n_kv 2^40": (gguf_bytes(start=begin(kvs=2**40)), "announces"),
    "n_kv one too many": (gguf_bytes(start=begin(kvs=2), data=bytes(32)), "."),
    "n_tensors 2^64-1": (gguf_bytes(start=begin(tensors=HUGE)), "announces"),
    "n_tensors 2^60": (gguf_bytes(start=begin(tensors=2**60)), "announces"),
    "n_tensors one too many": (gguf_bytes(start=begin(tensors=1), data=bytes(32)), "."),
    "u8 array 2^40": (with_kv(kv("k", ARRAY, array(U8, 2**40))), "announces"),
    "u8 array 2^64-1": (with_kv(kv("k", ARRAY, array(U8, HUGE))), "announces"),
    "u8 array 3e6 in 100 bytes": (hundred(with_kv(kv("k", ARRAY, array(U8, 3 * 10**6)))), "announces"),
    "f64 array wraps to 8 bytes": (with_kv(kv("k", ARRAY, array(F64, 2**61 + 1, bytes(8)))), "announces"),
    "string array 2^40": (with_kv(kv("k", ARRAY, array(STRING, 2**40))), "announces"),
    "string array wraps": (with_kv(kv("k", ARRAY, array(STRING, 2**61, bytes(64)))), "announces"),
    "array with a string 2^64-1": (with_kv(kv("k", ARRAY, array(STRING, 2, text("a", HUGE) + text("")))), "announces"),
    "string 2^64-1": (with_kv(kv("k", STRING, text("abc", HUGE))), "announces"),
    "string 2^63": (with_kv(kv("k", STRING, text("abc", 2**63))), "announces"),
    "string past the end": (with_kv(kv("k", STRING, text("abc", 1000))), "announces"),
    "key 2^64-1": (gguf_bytes([ARCH, text("k", HUGE) + struct.pack("<II", U32, 1)]), "announces"),
    "key past the end": (gguf_bytes([ARCH, text("k", 1000) + struct.pack("<II", U32, 1)]), "announces"),
    "tensor name 2^64-1": (with_tensors(text("a", HUGE) + struct.pack("<IQIQ", 1, 8, 0, 0)), "announces"),
    # names
    "empty key": (with_kv(kv("", U32, 1)), "0 bytes long"),
    "key not UTF-8": (with_kv(kv(b"k\xff\xfe", U32, 1)), "not UTF-8"),
    "key with a surrogate": (with_kv(kv(b"k\xed\xa0\x80", U32, 1)), "not UTF-8"),
    "tensor name not UTF-8": (with_tensors(entry(b"a\xc3", [8])), "not UTF-8"),
    "empty tensor name": (with_tensors(entry("", [8])), "0 bytes long"),
    "tensor name of 64 bytes": (with_tensors(entry("n" * 64, [8])), "64 bytes long"),
    "tensor name of 64 bytes in 32 letters": (with_tensors(entry("é" * 32, [8])), "64 bytes long"),
    "tensor name of 1000 bytes": (with_tensors(entry("n" * 1000, [8])), "1000 bytes long"),
    "duplicate key": (with_kv(kv("k", U32, 1), kv("k", U32, 1)), "twice"),
    "duplicate architecture": (with_kv(kv("general.architecture", STRING, "qwen2")), "twice"),
    "duplicate tensor": (with_tensors(entry("a", [8]), entry("a", [8], offset=32)), "twice"),
    "no architecture": (gguf_bytes([kv("general.name", STRING, "x")]), "general.architecture"),
    "no metadata": (gguf_bytes([], [entry("a", [8])], bytes(32)), "general.architecture"),
    "architecture is a number": (gguf_bytes([kv("general.architecture", U32, 3)]), "general.architecture"),
    # kinds of values
    "KV type 13": (with_kv(kv("k", 13, bytes(8))), "type 13"),
    "KV type 99": (with_kv(kv("k", 99, bytes(8))), "type 99"),
    "KV type 2^32-1": (with_kv(kv("k", 2**32 - 1, bytes(8))), f"type {2**32 - 1}"),
    "array of type 99": (with_kv(kv("k", ARRAY, array(99, 1, bytes(8)))), "type 99"),
    "nested array": (with_kv(kv("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"a")))), "array of type 9"),
    "arrays nested 10^4 deep": (with_kv(kv("k", ARRAY, array(ARRAY, 1) * 10**4 + array(U8, 0))), "array of type 9"),
    "alignment 0": (aligned(U32, 0), "general.alignment is 0"),
    "alignment 3": (aligned(U32, 3), "general.alignment is 3"),
    "alignment 2^31": (aligned(U32, 2**31), "general.alignment"),
    "alignment 2^40": (aligned(U64, 2**40), "general.alignment"),
    "alignment -32": (aligned(I32, -32), "general.alignment is -32"),
    "alignment a string": (aligned(STRING, "32"), "general.alignment"),
    "alignment a float": (aligned(F32, 32.0), "general.alignment"),
    "alignment true": (aligned(BOOL, True), "general.alignment"),
    "alignment an array": (aligned(ARRAY, array(U32, 1, struct.pack("<I", 32))), "general.alignment"),
    "alignment a long array": (aligned(ARRAY, array(U8, 9000, bytes(9000))), "general.alignment"),
    # shapes and types
    "n_dims 0": (with_tensors(entry("a", [])), "0 dimensions"),
    "n_dims 5": (with_tensors(entry("a", [1] * 5)), "5 dimensions"),
    "n_dims 10^6": (with_tensors(entry("a", [8], dims=10**6)), "1000000 dimensions"),
    "n_dims 2^32-1": (with_tensors(entry("a", [8], dims=2**32 - 1)), f"{2**32 - 1} dimensions"),
    "zero dimension": (with_tensors(entry("a", [8, 0])), "impossible shape"),
    "zero row": (with_tensors(entry("a", [0, 8])), "impossible shape"),
    "dimension 2^64-1": (with_tensors(entry("a", [HUGE])), "impossible shape"),
    "elements wrap to 0": (with_tensors(entry("a", [2**32, 2**32])), "impossible shape"),
    "elements wrap to 8": (with_tensors(entry("a", [2**32, 2**32 + 1, 8])), "impossible shape"),
    "bytes wrap to 0": (with_tensors(entry("a", [2**31, 2**30])), "needs"),
    "elements 2^62": (with_tensors(entry("a", [2**62])), "impossible shape"),
    "type 4": (with_tensors(entry("a", [32], 4)), "type 4"),
    "type 31": (with_tensors(entry("a", [32], 31)), "type 31"),
    "type 999": (with_tensors(entry("a", [32], 999)), "type 999"),
    "type 2^32-1": (with_tensors(entry("a", [32], 2**32 - 1)), f"type {2**32 - 1}"),
    "Q8_0 row of 33": (with_tensors(entry("a", [33, 32], 8), data=4096), "block of 32"),
    "Q8_0 rows of 16": (with_tensors(entry("a", [16, 2], 8)), "block of 32"),
    "Q4_K row of 128": (with_tensors(entry("a", [128, 2], 12)), "block of 256"),
    # data
    "dimensions beyond the file": (with_tensors(entry("a", [65])), "needs 260 bytes"),
    "data cut by 4 bytes": (with_tensors(entry("a", [64]), data=252), "needs 256 bytes"),
    "no data": (with_tensors(entry("a", [8]), data=0), "needs 32 bytes"),
    "file ends before the data begin": (gguf_bytes([ARCH], [entry("a", [1])])[:-31], "."),
    "offset behind the end": (with_tensors(entry("a", [8], offset=256)), "needs 32 bytes"),
    "offset 2^64-64": (with_tensors(entry("a", [8], offset=2**64 - 64)), "needs 32 bytes"),
    "offset 2^63": (with_tensors(entry("a", [8], offset=2**63)), "needs 32 bytes"),
    "offset + size wraps": (with_tensors(entry("a", [16], offset=2**64 - 32)), "needs 64 bytes"),
    "offset not aligned": (with_tensors(entry("a", [8], offset=4)), "multiple of the alignment"),
    "same bytes twice": (with_tensors(entry("a", [8]), entry("b", [8])), "overlaps"),
    "overlap": (with_tensors(entry("a", [16]), entry("b", [8], offset=32)), "overlaps"),
    "overlap in another order": (with_tensors(entry("b", [8], offset=32), entry("a", [16])), "overlaps"),
    "one within another": (with_tensors(entry("a", [64]), entry("b", [8], offset=96)), "overlaps"),
}  # fmt: skip


def valid() -> bytes:
    """A small file with every kind of metadata and three tensors."""
    kvs = [
        ARCH,
        *(kv(f"k.{kind}", kind, 1) for kind in FORMATS),
        kv("k.text", STRING, "naïve ☃"),
        kv("k.empty", STRING, ""),
        kv("k.numbers", ARRAY, array(I16, 3, struct.pack("<3h", 1, -2, 3))),
        kv("k.none", ARRAY, array(F32, 0)),
        kv("k.words", ARRAY, array(STRING, 2, text("a") + text(""))),
        kv("general.alignment", U32, 32),
    ]
    entries = [entry("a", [8, 2]), entry("b.weight", [32, 2], 8, 64), entry("c", [3], 0, 160)]
    return gguf_bytes(kvs, entries, bytes(range(132)) + bytes(28) + b"end of data\n" + bytes(20))


def test_the_valid_file_is_read(tmp_path: Path) -> None:
    """What the fixtures below break is right before."""
    (tmp_path / "x.gguf").write_bytes(valid())
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    values = checkpoint.metadata["gguf"]["x.gguf"].values
    assert all(values[f"k.{kind}"] == 1 and type(values[f"k.{kind}"]) is (float if kind in (F32, F64) else int)
               for kind in FORMATS if kind != BOOL)  # fmt: skip
    assert values["k.7"] is True
    assert values["k.text"] == "naïve ☃" and values["k.empty"] == ""
    assert values["k.numbers"] == (1, -2, 3) and values["k.none"] == ()
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == {
        "a": ("F32", (2, 8)), "b.weight": ("Q8_0", (2, 32)), "c": ("F32", (3,))
    }  # fmt: skip
    for alignment in (1, 2, 2**20):
        content = gguf_bytes(
            [ARCH, kv("general.alignment", U32, alignment)], [entry("a", [1])], b"\0\0\x80\x3f", alignment=alignment
        )
        (tmp_path / "x.gguf").write_bytes(content)
        assert open_checkpoint(tmp_path / "x.gguf").read("a").tolist() == [[1.0]]


def refused(capsys: pytest.CaptureFixture[str], path: Path, out: Path, arguments: Sequence[str]) -> str:
    """The one line that the command line says about a file when it refuses it."""
    before = {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")}
    assert main(list(arguments)) == 3, capsys.readouterr()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("Error: "), captured.err
    assert str(path) in captured.err
    assert "Traceback" not in captured.err and len(captured.err) < 1000
    assert {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")} == before, "nothing is written"
    return captured.err


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str, tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, why = MALFORMED[name]
    path, out = tmp_path / "x.gguf", tmp_path / "out.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        open_checkpoint(path)
    merge = ["merge", str(adapter), "--base", str(path), "-o", str(out)]
    assert refused(capsys, path, out, merge) == refused(capsys, path, out, ["inspect", str(path)])
    refused(capsys, path, out, ["merge", str(path), "--base", str(adapter), "-o", str(out)])


@pytest.mark.timeout(120)
def test_truncated_at_every_byte(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, path, out = valid(), tmp_path / "x.gguf", tmp_path / "out.gguf"
    end = len(content) - 32 + 12  # of the last tensor's data; what follows is padding
    arguments = ["merge", str(adapter), "--base", str(path), "-o", str(out)]
    for size in range(end):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"x\.gguf"):
            open_checkpoint(path)
        if size % 7 == 0:
            refused(capsys, path, out, arguments)
    for size in range(end, len(content) + 1):
        path.write_bytes(content[:size])
        assert len(open_checkpoint(path).tensors) == 3


NAMES = {
    "tensor": with_tensors(entry("a\n\x1b[31mError: b\r", [8, 0])),
    "tensor twice": with_tensors(entry("a\n", [8]), entry("a\n", [8], offset=32)),
    "tensor overlaps": with_tensors(entry("a\n", [8]), entry("b\x1b[2J", [8])),
    "key": with_kv(kv("k\n\x1b[2J", 99, bytes(8))),
    "long key": with_kv(kv("k" * 60_000, 99, bytes(8))),
    "long key twice": with_kv(kv("k" * 60_000, U32, 1), kv("k" * 60_000, U32, 1)),
    "long alignment": aligned(STRING, "x" * 60_000),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_cannot_break_the_message(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file calls its tensors reaches a terminal as text: one line, no commands, not for ever."""
    path = tmp_path / "x.gguf"
    path.write_bytes(NAMES[name])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else click takes commands out
    assert main(["inspect", str(path)]) == 3
    said = capsys.readouterr().err
    assert said.endswith("\n") and said[:-1].isprintable(), said[:200]
    assert str(path) in said and len(said) < 1000


MEASURE = """
import json, sys, time
from pathlib import Path

def peak():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1000

bare = peak()
from dora_tools.containers import open_checkpoint
from dora_tools.errors import DoraToolsError

times, opened = {}, []
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    start = time.perf_counter()
    try:
        opened.append((path.name, open_checkpoint(path)))
    except DoraToolsError:
        pass
    times[path.name] = time.perf_counter() - start
found = {
    name: {"values": c.metadata["gguf"][name].values, "tensors": len(c.tensors), "bytes": sum(t.nbytes for t in
           c.tensors.values())} for name, c in opened
}
heavy = [module for module in ("torch", "gguf", "numpy") if module in sys.modules]
print(json.dumps({"times": times, "peak": peak() - bare, "heavy": heavy, "opened": found}))
"""


def measure(folder: Path) -> dict[str, Any]:
    """Open every file of a folder in a process of its own: seconds, megabytes above the interpreter, what was read."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{max(found['times'].values()):.3f} s at most, {found['peak']:.1f} MB")
    assert found["heavy"] == []
    return found


@pytest.mark.timeout(60)
def test_malformed_files_cost_nothing(tmp_path: Path) -> None:
    for number, (content, _) in enumerate(MALFORMED.values()):
        (tmp_path / f"{number:03d}.gguf").write_bytes(content)
    content = valid()
    for size in range(0, len(content), 5):
        (tmp_path / f"cut-{size:05d}.gguf").write_bytes(content[:size])
    # lengths that are small beside the file, and would be large beside memory: a sparse gigabyte
    for name, kvs in {
        "bytes": kv("k", ARRAY, array(U8, GIGABYTE)),
        "doubles": kv("k", ARRAY, array(F64, GIGABYTE // 8)),
        "string": kv("k", STRING, text("", GIGABYTE)),
        "words": kv("k", ARRAY, array(STRING, 2, text("", GIGABYTE))),
        "key": text("", GIGABYTE),
    }.items():
        path = tmp_path / f"sparse-{name}.gguf"
        path.write_bytes(begin(3, 1, 3) + ARCH + kvs)
        with open(path, "r+b") as file:
            file.truncate(GIGABYTE + 2**20)
    found = measure(tmp_path)
    assert len(found["times"]) > len(MALFORMED) + 100
    assert not [name for name in found["opened"] if not name.startswith("cut-")]
    assert max(found["times"].values()) < 1
    assert found["peak"] < 50


INTERESTING = [0, 1, 2, 9, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, HUGE]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(valid())
    size = len(content)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, size - 1))
        change = data.draw(st.one_of(
            st.integers(0, 255).map(lambda n: bytes([n])),
            st.sampled_from(INTERESTING).map(lambda n: struct.pack("<Q", n)),
            st.sampled_from(INTERESTING).map(lambda n: struct.pack("<I", n & 2**32 - 1)),
            st.binary(max_size=16),
        ))  # fmt: skip
        content[at : at + len(change)] = change
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        assert sum(info.nbytes for info in checkpoint.tensors.values()) <= len(content)
        layout = Layout(lay_out(checkpoint))
        assert layout.size <= 2 * len(content) + 2**20
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).numel() == info.numel
    except DoraToolsError as error:
        assert error.exit_code == 3
        assert "mutated.gguf" in str(error) or "cannot be decoded" in str(error)


@pytest.mark.timeout(20)
def test_other_things_named_gguf(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    (tmp_path / "dead.gguf").symlink_to("nowhere.gguf")
    for name in ("pipe.gguf", "folder.gguf", "loop.gguf", "dead.gguf", "absent.gguf", "pipe"):
        with pytest.raises(InputError, match=name):
            open_checkpoint(tmp_path / name)


def test_a_file_without_the_suffix_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "sha256-b179").write_bytes(valid())  # as ollama stores them
    assert "gguf" in open_checkpoint(tmp_path / "sha256-b179").metadata
    (tmp_path / "model.gguf").symlink_to("sha256-b179")  # and the hub's cache
    assert open_checkpoint(tmp_path / "model.gguf").read("c").shape == (3, 1)


# --- large heads -----------------------------------------------------------------------------------------------------


def vocabulary(tokens: int, merges: int, model: str) -> list[bytes]:
    words = b"".join(text(f"tok{i * 7919 % tokens}") for i in range(tokens))
    return [
        kv("tokenizer.ggml.model", STRING, model),
        kv("tokenizer.ggml.tokens", ARRAY, array(STRING, tokens, words)),
        kv("tokenizer.ggml.scores", ARRAY, array(F32, tokens, np.arange(tokens, dtype="<f4").tobytes())),
        kv("tokenizer.ggml.token_type", ARRAY, array(I32, tokens, np.ones(tokens, "<i4").tobytes())),
        kv("tokenizer.ggml.merges", ARRAY, array(STRING, merges, b"".join(text(f"a{i} b{i}") for i in range(merges)))),
        kv("tokenizer.ggml.bos_token_id", U32, 2),
        kv("tokenizer.ggml.add_bos_token", BOOL, True),
    ]


LARGE = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}


@pytest.mark.timeout(120)
def test_a_large_vocabulary_is_walked_over(tmp_path: Path) -> None:
    kvs = [
        ARCH,
        kv("llama.attention.head_count_kv", ARRAY, array(I32, 80, struct.pack("<80i", *range(80)))),
        *vocabulary(262_144, 260_000, "gpt2"),
        kv("llama.rope.freq_base", F32, 500_000.0),
        kv("tokenizer.chat_template", STRING, "{{ x }}" * 500),
    ]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(kvs, [entry("a", [8])], bytes(32)))
    found = measure(tmp_path)
    values = found["opened"]["x.gguf"]["values"]
    assert not LARGE & values.keys()
    assert values == {
        "general.architecture": "llama", "llama.attention.head_count_kv": list(range(80)),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "llama.rope.freq_base": 500_000.0, "tokenizer.chat_template": "{{ x }}" * 500,
    }  # fmt: skip
    assert found["times"]["x.gguf"] < 1.5
    assert found["peak"] < 50
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    assert filecmp.cmp(tmp_path / "x.gguf", tmp_path / "out" / "x.gguf", shallow=False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("tokens", [0, 128_256])
def test_the_head_of_an_8b_model(tmp_path: Path, tokens: int) -> None:
    """291 tensors of Llama 3 8B; the data are a hole in the file."""
    hidden, kv_rows, inner, words = 4096, 1024, 14_336, 128_256
    shapes = {"token_embd.weight": [hidden, words], "output_norm.weight": [hidden], "output.weight": [hidden, words]}
    for layer in range(32):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_q": [hidden, hidden], "attn_k": [hidden, kv_rows], "attn_v": [hidden, kv_rows],
                "attn_output": [hidden, hidden], "ffn_gate": [hidden, inner], "ffn_up": [hidden, inner],
                "ffn_down": [inner, hidden], "attn_norm": [hidden], "ffn_norm": [hidden],
            }.items()
        }  # fmt: skip
    entries, size, elements = [], 0, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        matrix = len(shape) == 2
        entries.append(entry(name, shape, 12 if matrix else 0, size))
        size += count // 256 * 144 if matrix else count * 4
        elements += count
    assert len(entries) == 291 and elements == 8_030_261_248
    kvs = [ARCH, *(vocabulary(tokens, 280_147, "gpt2") if tokens else ()), kv("general.file_type", U32, 15)]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(kvs, entries))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    found = measure(tmp_path)
    assert found["opened"]["x.gguf"]["tensors"] == 291
    assert found["opened"]["x.gguf"]["bytes"] == size
    assert found["times"]["x.gguf"] < 2
    assert found["peak"] < 50
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(InputError, match="cut off"):
        open_checkpoint(path)


# --- types -----------------------------------------------------------------------------------------------------------

SIZES: Mapping[GGMLQuantizationType, tuple[int, int]] = gguf.GGML_QUANT_SIZES
WIDTH = 512


def test_types_are_those_of_ggml() -> None:
    ours = {kind.ggml: (kind.name, kind.block, kind.nbytes) for kind in DTYPES.values() if kind.ggml >= 0}
    theirs = {int(kind): (kind.name, block, size) for kind, (block, size) in SIZES.items()}
    assert {number: name for number, (name, _, _) in ours.items()} == GGML
    theirs.pop(int(GGMLQuantizationType.Q8_1))  # an intermediate of products: no file holds it
    assert ours == theirs


def kind_of(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name]


def random_values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_blocks(kind: GGMLQuantizationType, *shape: int) -> Array:
    """Bytes of a type: quantised by whoever can, else any bytes with scales that are finite."""
    block, size = SIZES[kind]
    if kind.name in ("F32", "F16", "BF16") or kind.name in GGUF_WRITES:
        quantised: Array = quants.quantize(random_values(*shape), kind)
        return quantised.view(np.uint8)
    if kind.name in LIBGGUF_WRITES:
        libgguf = pytest.importorskip("libgguf")
        rows: Array = np.asarray(libgguf.quantize_rows(random_values(*shape), kind))
        return rows.reshape(*shape[:-1], -1)
    raw = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    return (raw & 0xBF if kind.name != "F64" else raw & 0x3F).reshape(*shape[:-1], -1)


def decodable() -> list[GGMLQuantizationType]:
    found = []
    for kind, (_, size) in SIZES.items():
        try:
            quants.dequantize(np.zeros((1, size * 4), np.uint8), kind)
            found.append(kind)
        except NotImplementedError:
            pass
    return found


SHAPES = {"matrix": (7, WIDTH), "experts": (3, 5, WIDTH), "four": (2, 2, 3, WIDTH), "vector": (WIDTH,)}


def write_gguf(
    path: Path,
    tensors: Iterable[tuple[str, Array, GGMLQuantizationType | None]],
    setup: Callable[[GGUFWriter], None] = lambda writer: None,
    **options: Any,
) -> Path:
    writer = GGUFWriter(path, "llama", **options)
    setup(writer)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bits(values: Array | torch.Tensor) -> bytes:
    found = values.numpy() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(found).tobytes()


def test_every_type_that_gguf_decodes_is_covered() -> None:
    names = {kind.name for kind in decodable()}
    assert len(names) >= 26
    assert {kind.name for kind in DTYPES.values() if kind.quantised} | {"F32", "F16", "BF16"} == names


@pytest.mark.parametrize("kind", decodable(), ids=lambda kind: str(kind.name))
def test_reads_every_type_by_rows(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [(name, random_blocks(kind, *s), kind) for name, s in SHAPES.items()])
    checkpoint = open_checkpoint(path)
    for tensor in GGUFReader(path).tensors:
        info = checkpoint.tensors[tensor.name]
        assert (info.dtype, info.shape, info.nbytes) == (kind.name, SHAPES[tensor.name], tensor.n_bytes)
        wanted = quants.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(-1, info.width)
        assert wanted.dtype == np.float32 and np.isfinite(wanted).all() and np.abs(wanted).max() > 0
        whole = checkpoint.read(tensor.name)
        assert whole.dtype == torch.float32 and whole.shape == (info.rows, info.width)
        assert bits(whole) == bits(wanted)
        for start in range(0, info.rows, 1 if info.rows < 20 else 101):
            for stop in range(start, info.rows + 1, 1 if info.rows < 20 else 67):
                assert bits(checkpoint.read(tensor.name, start, stop)) == bits(wanted[start:stop])
                out = torch.full((stop - start, info.width), 7.0)
                assert checkpoint.read(tensor.name, start, stop, out).data_ptr() == out.data_ptr()
                assert bits(out) == bits(wanted[start:stop])
        assert bits(whole) == bits(wanted), "what was read earlier is nobody's buffer"
        span = checkpoint.span(tensor.name)
        assert span is not None
        assert path.read_bytes()[span.offset : span.offset + span.length] == bits(np.array(tensor.data))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "IQ4_XS", "BF16"])
def test_reads_more_than_one_slab(kind: str, tmp_path: Path) -> None:
    """Larger than the pieces in which types are decoded, and no multiple of them."""
    path = write_gguf(tmp_path / "x.gguf", [("a", random_blocks(GGMLQuantizationType[kind], 301, 768), kind_of(kind))])
    wanted = quants.dequantize(np.array(GGUFReader(path).tensors[0].data), kind_of(kind))
    checkpoint = open_checkpoint(path)
    assert bits(checkpoint.read("a")) == bits(wanted)
    assert bits(checkpoint.read("a", 100, 300)) == bits(wanted[100:300])


def test_reads_numbers_as_they_are(tmp_path: Path) -> None:
    kinds = (np.float64, np.int8, np.int16, np.int32, np.int64)
    arrays: dict[str, Array] = {str(np.dtype(kind)): np.arange(-6, 6).astype(kind).reshape(3, 4) for kind in kinds}
    arrays["float64"][0] = 1e300, np.pi, -1e-300, 0
    path = write_gguf(tmp_path / "x.gguf", [(name, values, None) for name, values in arrays.items()])
    checkpoint = open_checkpoint(path)
    for name, values in arrays.items():
        assert str(checkpoint.read(name).dtype) == f"torch.{name}"
        assert bits(checkpoint.read(name)) == bits(values)
        assert bits(checkpoint.read(name, 1, 3)) == bits(values[1:])


@pytest.mark.parametrize("kind", ["Q8_K", "Q1_0"])
def test_types_that_nobody_decodes_are_copied(kind: str, tmp_path: Path) -> None:
    raw = random_blocks(kind_of(kind), 4, WIDTH)
    path = write_gguf(tmp_path / "x.gguf", [("a", raw, kind_of(kind)), ("b", random_values(3, 4), None)])
    checkpoint = open_checkpoint(path)
    with pytest.raises(InputError, match=kind):
        checkpoint.read("a")
    write(checkpoint, Layout(lay_out(checkpoint, dtypes={"b": "F16"})), tmp_path / "out")
    assert bits(np.array(GGUFReader(tmp_path / "out" / "x.gguf").tensors[0].data)) == bits(raw)


def hard_values() -> Array:
    """Rows that rounding gets wrong first: zeros of both signs, subnormals, ties, the largest, one sign only."""
    rows = [
        random_values(WIDTH, seed=1),
        np.zeros(WIDTH, np.float32),
        -np.zeros(WIDTH, np.float32),
        np.full(WIDTH, 0.75, np.float32),
        np.full(WIDTH, -3.0, np.float32),
        -np.abs(random_values(WIDTH, seed=2)),
        random_values(WIDTH, seed=3) * 1e4,
        random_values(WIDTH, seed=4) * 1e-5,
        random_values(WIDTH, seed=5) * 1e-9,
        np.linspace(-127, 127, WIDTH, dtype=np.float32),
        np.round(np.linspace(-254, 254, WIDTH)).astype(np.float32) / 2,  # ties
        np.where(np.arange(WIDTH) % 33 == 0, 60_000, 1e-3).astype(np.float32),
        np.where(np.arange(WIDTH) % 2 == 0, 1, -1).astype(np.float32),
        np.full(WIDTH, 1e-42, np.float32),
        *random_values(7, WIDTH, seed=6) * np.logspace(-6, 3, 7, dtype=np.float32)[:, None],
    ]
    return np.stack(rows).astype(np.float32)


def encoded(values: Array, name: str, rows: int | None = None) -> bytes:
    """What ``encode`` writes, a number of rows at a time."""
    kind, parts = DTYPES[name], []
    for first in range(0, len(values), rows or len(values)):
        part = torch.from_numpy(values[first : first + (rows or len(values))].copy())
        raw = torch.full((part.numel() * kind.nbytes // kind.block,), 0xA5, dtype=torch.uint8)
        encode(part, name, raw)
        parts.append(bits(raw))
    return b"".join(parts)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16"])
def test_rounds_as_gguf_does(name: str) -> None:
    values = hard_values()
    wanted = bits(quants.quantize(values, kind_of(name)))
    assert encoded(values, name) == wanted
    for rows in (1, 2, 3, 17):
        assert encoded(values, name, rows) == wanted
    large = random_values(301, WIDTH, seed=8)  # more than is quantised in one go, and no multiple of it
    assert encoded(large, name) == bits(quants.quantize(large, kind_of(name)))
    double = torch.from_numpy(values.astype(np.float64))
    raw = torch.empty(len(wanted), dtype=torch.uint8)
    encode(double, name, raw)
    assert bits(raw) == wanted


@pytest.mark.parametrize("name", sorted(LIBGGUF_WRITES))
def test_rounds_as_libgguf_does(name: str) -> None:
    libgguf = pytest.importorskip("libgguf")
    values = hard_values()
    wanted = bits(np.asarray(libgguf.quantize_rows(values, kind_of(name))))
    for rows in (None, 1, 2, 3, 17):
        assert encoded(values, name, rows) == wanted
    large = random_values(301, WIDTH, seed=8)
    assert encoded(large, name) == bits(np.asarray(libgguf.quantize_rows(large, kind_of(name))))
    back = quants.dequantize(np.frombuffer(encoded(large, name), np.uint8).reshape(301, -1), kind_of(name))
    assert np.linalg.norm(back - large) < 0.4 * np.linalg.norm(large)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_round_alike_everywhere(name: str) -> None:
    """Every float32 with one of these upper 20 bits: all exponents, ties, subnormals, zeros, infinities."""
    upper = np.arange(2**20, dtype=np.uint32) << 12
    values = np.concatenate([(upper + low).astype(np.uint32).view(np.float32) for low in (0, 1, 0x800, 0xFFF)])
    values = values[~np.isnan(values)].reshape(-1, 1)
    assert np.isinf(values).sum() == 2
    assert encoded(values, name) == bits(quants.quantize(values, kind_of(name)))
    nan = np.full((32, 1), np.nan, np.float32)
    raw = np.frombuffer(encoded(nan, name), np.uint8).copy()
    assert torch.from_numpy(raw).view(torch.float16 if name == "F16" else torch.bfloat16).isnan().all()


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ1_S", "IQ3_S", "NVFP4", "Q8_K", "Q1_0"])
def test_types_that_nobody_writes(name: str) -> None:
    with pytest.raises(InputError, match=name):
        encoded(random_values(1, WIDTH), name)


# --- writing ---------------------------------------------------------------------------------------------------------


def rewritten(path: Path, out: Path, **options: Any) -> Path:
    checkpoint = open_checkpoint(path)
    write(checkpoint, Layout(lay_out(checkpoint, **options)), out)
    return out / path.name


def test_a_real_file_again(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_model("smollm2-gguf")
    assert filecmp.cmp(path, rewritten(path, tmp_path / "out"), shallow=False)
    checkpoint = open_checkpoint(path)
    name = "blk.7.attn_q.weight"
    span = checkpoint.span(name)
    assert span is not None and checkpoint.tensors[name].dtype == "Q4_1"
    with open(path, "rb") as file:
        file.seek(span.offset)
        raw = np.frombuffer(file.read(span.length), np.uint8).reshape(576, -1)
    assert bits(checkpoint.read(name)) == bits(quants.dequantize(raw, kind_of("Q4_1")))


def every_kind_of_metadata(writer: GGUFWriter) -> None:
    writer.add_file_type(1)
    writer.add_string("general.name", "naïve ☃")
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float64("x.f64", 1 / 3)
    writer.add_bool("x.bool", True)
    writer.add_uint8("x.u8", 255)
    writer.add_int64("x.i64", -(2**63))
    writer.add_uint64("x.u64", HUGE)
    writer.add_array("x.words", ["a", "", "☃"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 0.25])
    writer.add_array("x.bools", [True, False])


def mixed_tensors() -> list[tuple[str, Array, GGMLQuantizationType | None]]:
    """In no order, and of sizes that need padding."""
    return [
        ("output.weight", quants.quantize(random_values(3, 64), kind_of("Q8_0")), kind_of("Q8_0")),
        ("blk.0.attn_norm.weight", random_values(5), None),
        ("a.weight", random_values(7, 33).astype(np.float16), None),
        ("token_embd.weight", quants.quantize(random_values(9, 32), kind_of("Q4_0")), kind_of("Q4_0")),
        ("blk.0.ffn_up_exps.weight", quants.quantize(random_values(3, 2, 32), kind_of("Q5_1")), kind_of("Q5_1")),
        ("one", random_values(1), None),
        ("ids", np.arange(3, dtype=np.int32), None),
        ("n" * 63, random_values(2, 2, 3, 2), None),
    ]


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_rewriting_gives_the_same_bytes(tmp_path: Path, alignment: int | None, version: int) -> None:
    def setup(writer: GGUFWriter) -> None:
        every_kind_of_metadata(writer)
        if alignment:
            writer.add_custom_alignment(alignment)

    path = write_gguf(tmp_path / "x.gguf", mixed_tensors(), setup)
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)
    assert rewritten(path, tmp_path / "out").read_bytes() == content
    renamed = open_checkpoint(path)
    write(renamed, Layout(lay_out(renamed, file="other.gguf")), tmp_path / "named")
    assert (tmp_path / "named" / "other.gguf").read_bytes() == content


def test_a_file_of_metadata_only(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", [], every_kind_of_metadata)
    assert open_checkpoint(path).tensors == {}
    assert rewritten(path, tmp_path / "out").read_bytes() == path.read_bytes()


def test_padding_and_gaps_are_made_right(tmp_path: Path) -> None:
    """Data in another order, with holes and nothing after the last byte, as no loader of llama.cpp takes them."""
    entries = [entry("a", [3], 0, 128), entry("b", [5], 0, 32)]
    data = bytearray(128 + 12)
    data[128:], data[32:52] = struct.pack("<3f", 1, 2, 3), struct.pack("<5f", 4, 5, 6, 7, 8)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([ARCH], entries, bytes(data)))
    path = rewritten(tmp_path / "x.gguf", tmp_path / "out")
    tidy = struct.pack("<3f", 1, 2, 3) + bytes(20) + struct.pack("<5f", 4, 5, 6, 7, 8) + bytes(12)
    assert path.read_bytes() == gguf_bytes([ARCH], [entry("a", [3]), entry("b", [5], 0, 32)], tidy)


def parsed(path: Path) -> tuple[dict[str, Any], list[Any]]:
    reader = GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return values, list(reader.tensors)


def metadata_bytes(path: Path) -> bytes:
    span = open_checkpoint(path).metadata["gguf"][path.name].kv
    return path.read_bytes()[span.offset : span.offset + span.length]


@pytest.mark.parametrize(
    ("dtypes", "file_type"),
    [
        ({"token_embd.weight": "F32"}, gguf.LlamaFileType.ALL_F32),
        ({"a.weight": "F32", "token_embd.weight": "Q8_0"}, gguf.LlamaFileType.MOSTLY_Q8_0),
        ({"token_embd.weight": "F16"}, gguf.LlamaFileType.MOSTLY_F16),
        ({"token_embd.weight": "BF16", "a.weight": "BF16"}, gguf.LlamaFileType.MOSTLY_BF16),
        ({"output.weight": "Q5_0", "token_embd.weight": "Q5_0"}, gguf.LlamaFileType.MOSTLY_Q5_0),
    ],
    ids=str,
)
def test_changed_types(tmp_path: Path, dtypes: dict[str, str], file_type: gguf.LlamaFileType) -> None:
    def setup(writer: GGUFWriter) -> None:
        every_kind_of_metadata(writer)
        writer.add_custom_alignment(64)
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))  # before all others: in the middle of the metadata

    tensors = [t for t in mixed_tensors() if t[0] != "blk.0.ffn_up_exps.weight" and t[0] != "n" * 63]
    path = write_gguf(tmp_path / "x.gguf", tensors, setup)
    new = rewritten(path, tmp_path / "out", dtypes=dtypes)
    (before, stored), (after, written) = parsed(path), parsed(new)
    assert before["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert after == before | {"general.file_type": int(file_type)}
    head, changed = metadata_bytes(path), metadata_bytes(new)
    assert len(head) == len(changed)
    at = head.index(b"general.file_type") + len("general.file_type") + 4
    assert [i for i in range(len(head)) if head[i] != changed[i]] == [
        at + i for i in range(4) if before["general.file_type"] >> 8 * i & 255 != int(file_type) >> 8 * i & 255
    ]
    check_layout(new, 64)
    assert [t.name for t in written] == [t.name for t in stored]
    for old, now in zip(stored, written, strict=True):
        assert list(now.shape) == list(old.shape)
        if old.name not in dtypes:
            assert now.tensor_type == old.tensor_type and bits(now.data) == bits(old.data)
            continue
        assert now.tensor_type == kind_of(dtypes[old.name])
        values = quants.dequantize(np.array(old.data), old.tensor_type)
        assert bits(now.data) == bits(quants.quantize(values, kind_of(dtypes[old.name])))


def check_layout(path: Path, alignment: int) -> None:
    """Offsets as llama.cpp's loader demands them: in order, padded, without gaps, up to the end of the file."""
    tensors = GGUFReader(path).tensors
    start = tensors[0].data_offset
    assert start % alignment == 0
    for tensor in tensors:
        assert tensor.data_offset == start
        start += -(-tensor.n_bytes // alignment) * alignment
    assert start == path.stat().st_size


def test_without_a_file_type_none_is_added(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", mixed_tensors())
    new = rewritten(path, tmp_path / "out", dtypes={"token_embd.weight": "F32"}, file_type=7)
    assert metadata_bytes(new) == metadata_bytes(path)
    check_layout(new, 32)


@pytest.mark.parametrize("kind", ["unchanged", "string", "u64", "i32"])
def test_file_types_that_stay(tmp_path: Path, kind: str) -> None:
    """Where nothing changed, the file's own word counts; a key of another type is not written over."""

    def setup(writer: GGUFWriter) -> None:
        if kind == "string":
            writer.add_string("general.file_type", "mostly")
        elif kind == "u64":
            writer.add_uint64("general.file_type", 99)
        elif kind == "i32":
            writer.add_int32("general.file_type", 99)
        else:
            writer.add_uint32("general.file_type", 99)
        writer.add_string("general.name", "behind it")

    path = write_gguf(tmp_path / "x.gguf", mixed_tensors(), setup)
    new = rewritten(path, tmp_path / "out", **({} if kind == "unchanged" else {"dtypes": {"token_embd.weight": "F32"}}))
    if kind == "i32":
        assert parsed(new)[0] == parsed(path)[0] | {"general.file_type": 0}
    else:
        assert metadata_bytes(new) == metadata_bytes(path)


def test_a_file_type_that_is_asked_for(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", mixed_tensors(), every_kind_of_metadata)
    new = rewritten(path, tmp_path / "out", file_type=15)
    assert parsed(new)[0] == parsed(path)[0] | {"general.file_type": 15}
    assert new.stat().st_size == path.stat().st_size


def test_sharding_is_for_safetensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", mixed_tensors())
    with pytest.raises(UsageError, match="max-shard-size"):
        lay_out(open_checkpoint(path), max_shard_size=10**6)


@pytest.mark.parametrize("invocation", [[], [128_000, 2**32 - 1, 0]], ids=["lora", "alora"])
def test_new_files_are_those_of_the_writer(tmp_path: Path, invocation: list[int]) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "blk.0.attn_q.weight.lora_a": torch.randn(3, 33, generator=random),
        "blk.0.attn_q.weight.lora_b": torch.randn(7, 3, generator=random),
        "blk.0.ffn_up_exps.weight.lora_a": torch.randn(2, 3, 5, generator=random).half(),
        "blk.0.ffn_up_exps.weight.lora_b": torch.randn(2, 9, 3, generator=random).half(),
    }
    values: dict[str, Any] = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "general.name": "naïve ☃",
        "adapter.lora.alpha": 16.0, "general.quantization_version": 2, "x.large": 2**32 - 1, "x.true": True,
        "x.false": False, "x.third": 1 / 3,
    }  # fmt: skip
    if invocation:
        values["adapter.alora.invocation_tokens"] = tuple(invocation)

    def setup(writer: GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_string("general.name", "naïve ☃")
        writer.add_float32("adapter.lora.alpha", 16.0)
        writer.add_quantization_version(2)
        writer.add_uint32("x.large", 2**32 - 1)
        writer.add_bool("x.true", True)
        writer.add_bool("x.false", False)
        writer.add_float32("x.third", 1 / 3)
        if invocation:
            key = "adapter.alora.invocation_tokens"
            writer.add_key_value(key, invocation, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)

    path = write_gguf(tmp_path / "x.gguf", [(name, t.numpy(), None) for name, t in tensors.items()], setup)
    new = Tensors({name: constant(t) for name, t in tensors.items()}, metadata={"gguf_values": values})
    write(new, Layout(lay_out(new, file="new.gguf")), tmp_path / "out")
    assert (tmp_path / "out" / "new.gguf").read_bytes() == path.read_bytes()
    assert open_checkpoint(path).metadata["gguf"]["x.gguf"].values == {
        **values, "x.third": float(np.float32(1 / 3))
    }  # fmt: skip


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", mixed_tensors())
    checkpoint = open_checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(InputError, match="cut off"):
        checkpoint.read("n" * 63)
    with pytest.raises(InputError, match="cut off"):
        write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_alias_is_a_tensor_more(tmp_path: Path) -> None:
    """As when a tied head gets a tensor of its own."""

    def setup(writer: GGUFWriter) -> None:
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))

    tied = [t for t in mixed_tensors() if t[0] == "token_embd.weight" or t[1].ndim == 1]
    path = write_gguf(tmp_path / "x.gguf", tied, setup)
    untied = arranged(open_checkpoint(path), {"output.weight": "token_embd.weight"})
    write(untied, Layout(lay_out(untied)), tmp_path / "out")
    new = tmp_path / "out" / "x.gguf"
    assert metadata_bytes(new) == metadata_bytes(path)
    check_layout(new, 32)
    before, after = ({t.name: (t.tensor_type, bits(t.data)) for t in parsed(p)[1]} for p in (path, new))
    assert list(after) == [*before, "output.weight"]
    assert after == before | {"output.weight": before["token_embd.weight"]}


# --- files of a split ------------------------------------------------------------------------------------------------

PARTS = [f"m-{number:05d}-of-00004.gguf" for number in range(1, 5)]


def write_split(folder: Path, **options: Any) -> list[Path]:
    folder.mkdir()
    write_gguf(folder / "m.gguf", mixed_tensors(), every_kind_of_metadata, **(options or {"split_max_tensors": 2}))
    found = sorted(folder.glob("*.gguf"))
    assert len(found) > 1 and found[0].name.startswith("m-00001-of-")
    return found


def contents(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (i.dtype, i.shape, bits(checkpoint.read(name))) for name, i in checkpoint.tensors.items()}


@pytest.mark.parametrize("start", [0, 2, 3, None])
def test_splits_are_opened_from_any_part(tmp_path: Path, start: int | None) -> None:
    parts = write_split(tmp_path / "model")
    assert [p.name for p in parts] == PARTS
    whole = write_gguf(tmp_path / "whole.gguf", mixed_tensors(), every_kind_of_metadata)
    checkpoint = open_checkpoint(tmp_path / "model" if start is None else parts[start])
    assert list(checkpoint.tensors) == [name for name, _, _ in mixed_tensors()]
    assert contents(checkpoint) == contents(open_checkpoint(whole))
    assert list(checkpoint.metadata["gguf"]) == PARTS
    write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    for part in parts:
        assert (tmp_path / "out" / part.name).read_bytes() == part.read_bytes()
    write(checkpoint, Layout(lay_out(checkpoint, file="new.gguf")), tmp_path / "named")
    for number, part in enumerate(parts, 1):
        assert (tmp_path / "named" / f"new-{number:05d}-of-00004.gguf").read_bytes() == part.read_bytes()
    assert contents(open_checkpoint(tmp_path / "named")) == contents(open_checkpoint(whole))


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "model", split_max_tensors=3, small_first_shard=True)
    checkpoint = open_checkpoint(parts[1])
    assert {info.file for info in checkpoint.tensors.values()} == {p.name for p in parts[1:]}
    write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    for part in parts:
        assert (tmp_path / "out" / part.name).read_bytes() == part.read_bytes()


def test_changed_types_in_a_split(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "model")
    checkpoint = open_checkpoint(parts[0])
    dtypes = {name: "F32" for name in ("output.weight", "a.weight", "token_embd.weight", "blk.0.ffn_up_exps.weight")}
    write(checkpoint, Layout(lay_out(checkpoint, dtypes=dtypes)), tmp_path / "out")
    for part in parts:
        new = tmp_path / "out" / part.name
        check_layout(new, 32)
        expected = parsed(part)[0]
        if "general.file_type" in expected:
            expected["general.file_type"] = 0
        assert parsed(new)[0] == expected
        for old, now in zip(parsed(part)[1], parsed(new)[1], strict=True):
            if old.name in dtypes:
                assert bits(now.data) == bits(quants.dequantize(np.array(old.data), old.tensor_type))
            else:
                assert now.tensor_type == old.tensor_type and bits(now.data) == bits(old.data)


def patch(path: Path, key: str, layout: str, value: int) -> None:
    """Another number in place of the metadata's own."""
    content = bytearray(path.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    content[at : at + struct.calcsize(layout)] = struct.pack("<" + layout, value)
    path.write_bytes(content)


def test_splits_that_are_not_complete(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "model")
    kept = {part: part.read_bytes() for part in parts}

    def fails(path: Path, why: str) -> None:
        with pytest.raises(InputError, match=why):
            open_checkpoint(path)
        for part, content in kept.items():
            part.write_bytes(content)

    parts[2].unlink()
    fails(parts[0], PARTS[2])
    for part in parts[1:3]:
        part.unlink()
    fails(parts[0], f"2 are not there: {PARTS[1]}, {PARTS[2]}")
    parts[3].unlink()
    fails(tmp_path / "model", PARTS[3])
    parts[0].unlink()
    fails(parts[2], PARTS[0])
    patch(parts[1], "split.no", "H", 2)
    fails(parts[0], PARTS[1])
    patch(parts[3], "split.count", "H", 5)
    fails(parts[0], PARTS[3])
    patch(parts[0], "split.count", "H", 3)
    fails(parts[3], PARTS[0])
    shutil.copy(parts[1], parts[2])  # one of them twice
    fails(parts[0], "is in m-00002|does not say")
    parts[2].write_bytes(parts[2].read_bytes()[:-64])
    fails(parts[0], "cut off")
    parts[2].write_bytes(LFS)
    fails(parts[0], PARTS[2])
    assert contents(open_checkpoint(parts[0])), "whole again"


def test_splits_with_fewer_tensors_than_announced(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "model")
    for part in parts:
        patch(part, "split.tensors.count", "i", 9)  # llama.cpp: 9 tensors expected but 8 found
    with pytest.raises(InputError, match="9"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("name", ["m-00005-of-00004.gguf", "m-00000-of-00004.gguf", "m-00001-of-00000.gguf"])
def test_numbers_that_no_part_has(tmp_path: Path, name: str) -> None:
    parts = write_split(tmp_path / "model")
    shutil.copy(parts[0], tmp_path / "model" / name)
    with pytest.raises(InputError, match=r"file \d of \d"):
        open_checkpoint(tmp_path / "model" / name)


def test_a_part_under_another_name(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "model")
    for part in (parts[0], parts[2]):
        shutil.copy(part, tmp_path / "alone.gguf")
        with pytest.raises(InputError, match="one of 4 files"):
            open_checkpoint(tmp_path / "alone.gguf")


@pytest.mark.timeout(20)
def test_a_hundred_thousand_parts(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-99999.gguf").write_bytes(valid())
    with pytest.raises(InputError, match="99998 are not there"):
        open_checkpoint(tmp_path)


def test_a_whole_file_named_as_the_only_part(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00001.gguf").write_bytes(valid())
    assert len(open_checkpoint(tmp_path).tensors) == 3
    assert rewritten(tmp_path / "m-00001-of-00001.gguf", tmp_path / "out").read_bytes() == valid()


def test_the_same_tensor_in_two_parts(tmp_path: Path) -> None:
    for number in range(2):
        extra = [kv("split.no", U16, number), kv("split.count", U16, 2)]
        content = gguf_bytes([ARCH, *extra], [entry("a", [8])], bytes(32))
        (tmp_path / f"m-{number + 1:05d}-of-00002.gguf").write_bytes(content)
    with pytest.raises(InputError, match="holds a, which is in"):
        open_checkpoint(tmp_path)


def test_directories_with_more_than_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    write_gguf(folder / "a.gguf", mixed_tensors())
    assert list(open_checkpoint(folder).metadata["gguf"]) == ["a.gguf"]
    write_gguf(folder / "b.gguf", mixed_tensors())
    with pytest.raises(InputError, match=r"several checkpoints \(a\.gguf, b\.gguf\)"):
        open_checkpoint(folder)
    write_split(tmp_path / "splits")
    for part in PARTS:
        shutil.copy(tmp_path / "splits" / part, tmp_path / "splits" / part.replace("m-", "other-"))
    with pytest.raises(InputError, match="several checkpoints"):
        open_checkpoint(tmp_path / "splits")


def test_a_split_beside_another_file(tmp_path: Path) -> None:
    write_split(tmp_path / "model")
    write_gguf(tmp_path / "model" / "other.gguf", mixed_tensors())
    with pytest.raises(InputError, match=r"other\.gguf"):
        open_checkpoint(tmp_path / "model")


def test_hub_folders_are_opened(tmp_path: Path) -> None:
    """A config beside the file is read with it; the model in full precision comes before it."""
    write_gguf(tmp_path / "m.gguf", mixed_tensors())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata["config"] == {"model_type": "llama"}
    tiny.write_base(tmp_path)
    assert "gguf" not in open_checkpoint(tmp_path).metadata, "the full-precision weights come first"


def test_version_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(start=begin(order=">")))
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(path)
    path.write_bytes(gguf_bytes(start=begin(0)))
    with pytest.raises(UnsupportedError, match="version 0"):
        open_checkpoint(path)
