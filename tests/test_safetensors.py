"""The safetensors container: row reads, layouts byte-identical to the library's save_file, hostile headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_tools.checkpoint import Tensors, View, arranged, constant, overlay, tiles
from dora_tools.containers import open_checkpoint
from dora_tools.containers.safetensors import SafetensorsCheckpoint, lay_out
from dora_tools.errors import InputError, UsageError
from dora_tools.layout import File, Layout
from dora_tools.write import write

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


def of_every_type() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"z.{str(t)[6:]}": (torch.randn(5, 3) * 4).abs().to(t) for t in TYPES}
    shapes = {"scalar": (), "vector": (7,), "empty": (0, 3), "cube": (2, 3, 4), 'odd "naïve"\n/名': (2, 2)}
    return tensors | {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(of_every_type(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_reads_every_type_by_rows(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    for name, tensor in load_file(model).items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        wanted = (tensor.float() if tensor.dtype in FLOATS else tensor).reshape(-1, info.width)
        assert torch.equal(checkpoint.read(name), wanted)
        for start in range(info.rows):
            for stop in range(start, info.rows + 1):
                assert torch.equal(checkpoint.read(name, start, stop), wanted[start:stop])
        out = torch.empty(wanted.shape, dtype=wanted.dtype)
        checkpoint.read(name, out=out)
        assert torch.equal(out, wanted)


def test_rewriting_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """Once from the base's own header, once laid out anew as save_file does."""
    checkpoint = open_checkpoint(model)
    write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == model.read_bytes()
    memory = Tensors({name: constant(tensor) for name, tensor in load_file(model).items()})
    write(memory, Layout(lay_out(memory, file="model.safetensors")), tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == model.read_bytes()


def test_header_with_foreign_order_and_metadata_is_kept(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "a": {"dtype": "F64", "shape": [1], "data_offsets": [4, 12]},
        "__metadata__": {"who": "me", "format": "pt"},
    }
    text = json.dumps(header).encode() + b"   "
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<fd", 1.5, 2.5))
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    assert (tmp_path / "out" / "x.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize("limit", [1, 60, 200, 10**6])
def test_dealing_into_shards(model: Path, tmp_path: Path, limit: int) -> None:
    checkpoint = open_checkpoint(model)
    files = lay_out(checkpoint, max_shard_size=limit)
    write(checkpoint, Layout(files), tmp_path / "out")
    written: dict[str, torch.Tensor] = {}
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for path in shards:
        part = load_file(path)
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= limit
        written |= part
    assert written.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(t, written[n]) for n, t in load_file(model).items())
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in written.values())
        assert index["weight_map"].keys() == written.keys()
        reopened = open_checkpoint(tmp_path / "out")
        assert reopened.tensors.keys() == written.keys()
    with pytest.raises(UsageError):
        lay_out(checkpoint, max_shard_size=0)


def test_converting_types_rounds_once(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    write(checkpoint, Layout(lay_out(checkpoint, dtypes={"z.float64": "BF16", "cube": "F16"})), tmp_path / "out")
    written, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(model)
    assert torch.equal(written["z.float64"], before["z.float64"].to(torch.bfloat16))
    assert torch.equal(written["cube"], before["cube"].to(torch.float16))
    assert torch.equal(written["vector"], before["vector"])


def test_tiles_cover_every_row_once() -> None:
    from dora_tools.checkpoint import TILE_ELEMENTS, TensorInfo

    for shape in [(0, 4), (1, 1), (3, TILE_ELEMENTS * 2), (1000, 700), (100_001, 64), (TILE_ELEMENTS * 3 + 5,), ()]:
        cut = tiles(TensorInfo("F32", shape))
        rows = [row for first, last in cut for row in range(first, last)]
        assert rows == list(range(TensorInfo("F32", shape).rows))
        if len(cut) > 1:
            step = cut[0][1] - cut[0][0]
            assert all(step <= last - first < 2 * step for first, last in cut[:-1])
            assert cut[-1][1] - cut[-1][0] >= step // 2


def test_views_keep_bytes_where_they_can(model: Path) -> None:
    base = open_checkpoint(model)
    view = arranged(base, {"alias": "cube"}, {"cube": 12})
    assert view.span("alias") == base.span("cube")
    assert torch.equal(view.read("cube", 1, 2), base.read("cube").reshape(2, 12)[1:2])
    out = torch.empty(1, 12)
    assert torch.equal(view.read("cube", 1, 2, out), base.read("cube").reshape(2, 12)[1:2])
    assert torch.equal(view.read("cube", 1, 2), out)
    over = overlay(base, Tensors({"cube": constant(torch.ones(2, 3, 4, dtype=torch.float16))}))
    assert isinstance(over, View)
    assert over.tensors["cube"].dtype == "F32"
    assert over.span("cube") is None
    assert torch.equal(over.read("cube"), torch.ones(6, 4))


# --- hostile files ---------------------------------------------------------------------------------------------------


def raw(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": raw(b""),
    "huge header": raw(ONE, b"1234", 1 << 62),
    "header longer than file": raw(ONE, b"1234", 10_000),
    "not json": raw(b"{nope}  ", b"1234"),
    "a list": raw(b"[]      "),
    "deep": raw(b"[" * 5000),
    "overlap": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        b"123456",
    ),
    "hole": raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"12345678"),
    "beyond the end": raw(ONE, b"12"),
    "behind the end": raw(ONE, b"123456"),
    "wrong size": raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"),
    "overflow": raw(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}', b"1234"),
    "negative": raw(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "unknown type": raw(b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "twice": raw(ONE[:-1] + b"," + ONE[1:], b"1234"),
    "html": b"<!DOCTYPE html><html>not found</html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=r"not a complete safetensors file|Git LFS pointer"):
        open_checkpoint(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_are_read_or_refused(model: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes()[: data.draw(st.integers(0, 4000))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = model.parent / "mutated.safetensors"
    path.write_bytes(content)
    try:
        checkpoint = SafetensorsCheckpoint([path])
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).numel() == info.numel
    except InputError:
        pass


def test_a_file_that_shrinks_while_it_is_read(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    with open(model, "r+b") as file:
        file.truncate(model.stat().st_size - 64)
    last = list(checkpoint.tensors)[-1]
    with pytest.raises(InputError, match="cut off"):
        for name in checkpoint.tensors:
            checkpoint.read(name)
    with pytest.raises(InputError, match="cut off"):
        write(checkpoint, Layout(lay_out(checkpoint)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert last


def test_literal_files_and_permissions(tmp_path: Path) -> None:
    write(Tensors({}), Layout([File("a/b.json", (b"{}", b"\n"))]), tmp_path / "out")
    path = tmp_path / "out" / "a" / "b.json"
    assert path.read_bytes() == b"{}\n"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "the umask decides, not the library"
    assert np.all([p.suffix != ".part" for p in (tmp_path / "out").rglob("*")])


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_in_memory_are_not_written_over(tmp_path: Path, threads: int) -> None:
    """What is read from memory is somebody's tensor: neither its values nor its precision may end up in a buffer."""
    half = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    whole = {f"w{i}": torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    tensors = {"a": half, **whole}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = Tensors({name: constant(tensor) for name, tensor in tensors.items()})
    layout = Layout(lay_out(memory, file="m.safetensors", dtypes={name: "F32" for name in tensors}))
    write(memory, layout, tmp_path / "out", threads=threads)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert all(torch.equal(t, before[n].float()) for n, t in load_file(tmp_path / "out" / "m.safetensors").items())
