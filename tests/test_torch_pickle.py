"""Files of torch.save: read as torch.load reads them, lazily, and without running anything that they hold."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_tools.checkpoint import Checkpoint
from dora_tools.containers import pickles, torch_pickle
from dora_tools.containers.pickles import Inert, TensorRecord
from dora_tools.containers.source import Source
from dora_tools.containers.torch_pickle import TorchFile, open_torch, read_pickle
from dora_tools.errors import InputError, UnsupportedError

LEGACY_HEAD = b"".join(
    pickle.dumps(part, 2)
    for part in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


class Settings:
    """A user's class, as it ends up in hyper_parameters."""

    def __init__(self) -> None:
        self.rank = 8
        self.nested = {"alpha": 16.0}


class Slotted:
    __slots__ = ("alpha", "rank")

    def __init__(self) -> None:
        self.rank, self.alpha = 4, 32


class Config(dict):  # type: ignore[type-arg]
    pass


class Layers(list):  # type: ignore[type-arg]
    pass


class LoRALayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.rank = 16, 4
        self.A = torch.nn.Parameter(torch.randn(6, 4))
        self.register_buffer("seen", torch.tensor(3))


class Packed(torch.nn.Parameter):
    """What bitsandbytes calls Params4bit."""


class Marked(torch.Tensor):
    """A tensor subclass: its values may mean anything."""


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def write(obj: Any, **options: Any) -> Path:
        path = tmp_path / "file.pt"
        torch.save(obj, path, _use_new_zipfile_serialization=request.param == "zip", **options)
        return path

    return write


def expected(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    return tensor.reshape(tensor.numel() // width if width else 0, width)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def check(path: Path, wanted: dict[str, torch.Tensor]) -> TorchFile:
    """All names in order, all values, all row ranges of interest, into a given tensor too, and the spans' bytes."""
    opened = open_torch(path)
    assert list(opened.tensors) == list(wanted)
    for name, tensor in wanted.items():
        info, rows = opened.tensors[name], expected(tensor)
        assert info.shape == tuple(tensor.shape) and info.file == path.name
        read = opened.read(name)
        assert read.dtype == rows.dtype and read.shape == (info.rows, info.width) and bits(read) == bits(rows), name
        for start, stop in [(0, 1), (1, info.rows), (info.rows // 2, info.rows // 2 + 2), (info.rows, None)]:
            part = opened.read(name, start, stop)
            assert part.shape == (len(rows[start:stop]), info.width) and bits(part) == bits(rows[start:stop]), name
        out = torch.empty_like(rows)
        assert opened.read(name, 0, None, out) is out or out.numel() == 0
        assert bits(out) == bits(rows)
        span = opened.span(name)
        assert (span is not None) == tensor.is_contiguous()
        if span is not None:
            assert span.path == path and span.length == info.nbytes == tensor.numel() * tensor.element_size()
            assert path.read_bytes()[span.offset : span.offset + span.length] == bits(tensor.detach())
    return opened


def as_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, prefix: str = "archive/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}data.pkl", data)
        for key, value in (storages or {}).items():
            archive.writestr(f"{prefix}data/{key}", value)
    return path


def as_legacy(path: Path, data: bytes, storages: dict[str, bytes] | None = None) -> Path:
    storages = storages or {}
    tail = b"".join(struct.pack("<q", len(value) // 4) + value for value in storages.values())
    path.write_bytes(LEGACY_HEAD + data + pickle.dumps(list(storages), 2) + tail)
    return path


def tensor_pickle(
    offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), numel: Any = 6, kind: str = "Float"
) -> bytes:
    """{"w": a tensor}, with whatever sizes."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = plain("storage") + f"ctorch\n{kind}Storage\n".encode() + plain("0") + plain("cpu") + plain(numel)
    args = b"(" + b"(" + storage + b"tQ" + plain(offset) + plain(size) + plain(stride) + plain(False) + b"}" + b"t"
    return b"\x80\x02}" + plain("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs."


# ---------------------------------------------------------------------------------------------------- what is read


def test_is_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    opened: Checkpoint = open_torch(tmp_path / "a.pt")
    assert opened.tensors["a"].dtype == "F32"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_dtype(save: Any, dtype: torch.dtype, protocol: int) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 120, (7 * 16,), dtype=torch.uint8)
    tensor = raw[: 7 * 2 * dtype.itemsize].view(dtype).reshape(7, 2)
    tensors = {"w": tensor, "v": tensor[:, 0].contiguous(), "turned": tensor.T}
    path = save(tensors, pickle_protocol=protocol)
    check(path, tensors)
    with contextlib.suppress(AttributeError):  # torch 2.13 cannot load float8 and uint16 … 64 from its own old format
        check(path, torch.load(path, weights_only=False))


def test_views_of_one_storage(save: Any) -> None:
    base = torch.randn(12, 10)
    tensors = {
        "base": base,
        "transposed": base.T,
        "rows": base[3:7],
        "columns": base[:, 2:5],
        "stepped": base[::3],
        "column": base[:, 4],
        "cube": base.reshape(3, 4, 10).permute(2, 0, 1),
        "cube_part": base.reshape(3, 4, 10)[:, 1:3],
        "expanded": base[0].expand(5, 10),
        "scalar": base[11, 9],
        "one_row": base[2:3].T,
        "empty_part": base[5:5],
        "tied": base[3:7],
    }
    path = save(tensors)
    opened = check(path, torch.load(path, weights_only=False))
    assert opened.metadata["aliases"] == {"tied": "rows"}


def test_shapes(save: Any) -> None:
    tensors = {
        "scalar": torch.tensor(3.5), "count": torch.tensor(7), "none": torch.empty(0), "wide": torch.empty(0, 5),
        "thin": torch.empty(5, 0), "four": torch.randn(2, 3, 4, 5), "one": torch.randn(1, 1, 1),
    }  # fmt: skip
    check(save(tensors), tensors)


def test_parameters_and_ties(save: Any) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    marked = torch.nn.Parameter(torch.randn(2, 2))
    marked.note = "an attribute"  # type: ignore[attr-defined]
    plain = torch.randn(2)
    plain.note = "another"  # type: ignore[attr-defined]
    path = save({"embed": weight, "head": weight, "copy": weight.detach().clone(), "marked": marked, "plain": plain})
    opened = check(path, torch.load(path, weights_only=False))
    assert opened.metadata["aliases"] == {"head": "embed"} and not opened.metadata["opaque"]


def test_module_state_dict_and_order(save: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict()
    assert hasattr(state, "_metadata")
    opened = check(save(state), dict(state))
    assert type(opened.metadata["object"]) is dict and isinstance(opened.metadata["object"]["0.weight"], TensorRecord)


def test_lightning_like(save: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=True)
    state = collections.OrderedDict((f"model.layers.{i}.weight", torch.randn(4, 3)) for i in range(3))
    hyper = {"args": argparse.Namespace(lora_r=8, lr=1e-4), "peft": lora, "mine": Settings(), "slots": Slotted()}
    plain = {
        "set": {1, 2}, "frozen": frozenset({"a"}), "tuple": (1, (2, None)), "bytes": b"\x00\xff", "empty": b"",
        "array": bytearray(b"xyz"), "complex": 1 + 2j, "size": torch.Size((2, 3)), "slice": slice(1, None, 2),
        "default": collections.defaultdict(list, {"k": [1]}), "float": float("inf"), "big": 1 << 80, "text": "ö\n",
    }  # fmt: skip
    inert = {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "path": Path("/x"),
        "config": Config(a=1),
        "type": Settings,
    }
    inert["layers"] = Layers([1, 2])
    path = save({
        "epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": state,
        "hyper_parameters": {**hyper, **plain, **inert},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
    })  # fmt: skip
    wanted = {f"state_dict.{name}": value for name, value in state.items()}
    opened = check(path, {**wanted, "optimizer_states.0.state.0.exp_avg": torch.ones(3)})
    assert opened.metadata["opaque"] == {}
    top = opened.metadata["object"]
    found = top["hyper_parameters"]
    assert top["epoch"] == 1
    assert found["args"].name == "Namespace" and found["args"].attributes == {"lora_r": 8, "lr": 1e-4}
    assert found["peft"].qualified == "peft.tuners.lora.config.LoraConfig"
    config = found["peft"].attributes
    assert config["r"] == 8 and config["lora_alpha"] == 16 and config["use_dora"] is True
    assert config["target_modules"] == {"q_proj", "v_proj"}
    assert config["peft_type"].name == "PeftType" and config["peft_type"].args == ("LORA",)
    assert found["mine"].name == "Settings" and found["mine"].attributes == {"rank": 8, "nested": {"alpha": 16.0}}
    assert found["slots"].attributes == {"rank": 4, "alpha": 32}
    for key, value in plain.items():
        kinds = {"size": tuple, "default": dict}
        assert found[key] == value and type(found[key]) is kinds.get(key, type(value)), key
    assert found["dtype"].qualified == "torch.bfloat16" and found["dtype"].args is None
    assert found["device"].args == ("cpu",) and found["path"].name in ("PosixPath", "WindowsPath")
    assert found["config"].items == {"a": 1} and found["layers"].items == [1, 2]
    assert isinstance(found["type"], Inert) and found["type"].args is None
    assert repr(found["mine"]) == f"<{__name__}.Settings(…)>" and hash(found["mine"])


def test_whole_module(save: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), LoRALayer())
    opened = open_torch(save(model))
    assert opened.tensors.keys() == model.state_dict().keys() and not opened.metadata["opaque"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.read(name).reshape(tensor.shape), tensor)
    assert opened.metadata["attributes"]["1"]["alpha"] == 16 and opened.metadata["attributes"]["0"]["in_features"] == 3
    layer = opened.metadata["object"].attributes["_modules"]["1"]
    assert layer.name == "LoRALayer" and layer.attributes["alpha"] == 16 and layer.attributes["rank"] == 4
    named = opened.named({
        "1.A": layer.attributes["_parameters"]["A"],
        "1.seen": layer.attributes["_buffers"]["seen"],
        "again": layer.attributes["_parameters"]["A"],
    })  # fmt: skip
    assert torch.equal(named.read("1.A"), model[1].A.detach())  # type: ignore[operator]
    assert named.read("1.seen").item() == 3
    assert named.metadata["aliases"] == {"again": "1.A"} and named.metadata["object"] is opened.metadata["object"]


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: torch.randn(3, 3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.randn(3, 3).as_subclass(Marked), "Marked"),
        (lambda: torch.nn.Parameter(torch.randn(3).as_subclass(Marked)), "Marked"),
        (lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
        (lambda: torch.randn(2, dtype=torch.complex128), "ComplexDoubleStorage"),
        (lambda: torch.randn(2, dtype=torch.complex64).conj(), "_rebuild_tensor_v2 of ComplexFloatStorage"),
        (lambda: torch.empty(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda: torch.randn(3).numpy(), "numpy"),
        (lambda: torch.randn(3).untyped_storage(), "a bare UntypedStorage"),
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: argparse.Namespace(weights=[torch.ones(1)]), "argparse.Namespace"),
        (lambda: {torch.ones(1)}, "a set of tensors"),
        (lambda: Config(w=torch.ones(2)), "Config"),
    ],
)
def test_nothing_is_dropped(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"plain": torch.ones(2), "deep": [{"odd": make()}]}, path)
    opened = open_torch(path)
    assert list(opened.tensors) == ["plain"]
    assert list(opened.metadata["opaque"]) == ["deep.0.odd"] and said in opened.metadata["opaque"]["deep.0.odd"]


def test_bitsandbytes_like_parameter(tmp_path: Path) -> None:
    weight = Packed(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = {"absmax": torch.ones(2)}  # type: ignore[attr-defined]
    torch.save({"w": weight}, tmp_path / "a.pt")
    opened = open_torch(tmp_path / "a.pt")
    assert opened.metadata["opaque"].keys() == {"w"} and not opened.tensors
    inside = opened.metadata["object"]["w"].args
    assert inside[3]["quant_state"]["absmax"].shape == (2,)  # all of it can be had by who understands it


def test_a_tensor_or_a_list_alone(save: Any) -> None:
    check(save(torch.eye(3)), {"object": torch.eye(3)})
    check(save([torch.eye(3), (torch.ones(2), 5)]), {"0": torch.eye(3), "1.0": torch.ones(2)})


def test_cycles_and_towers(save: Any) -> None:
    cycle: dict[str, Any] = {"w": torch.ones(2)}
    cycle["self"] = [cycle]
    tower: Any = []
    for _ in range(80):
        tower = [tower, tower]
    opened = open_torch(save({"cycle": cycle, "tower": tower}))
    assert list(opened.tensors) == ["cycle.w"]
    full: Any = [torch.ones(1)]
    for _ in range(60):
        full = [full, full]
    with pytest.raises(InputError, match="more than 100 tensors"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_pickle, "MAX_NAMES", 100)
        open_torch(save(full))


def test_names_must_differ_and_fit(save: Any) -> None:
    with pytest.raises(InputError, match=r"two of its tensors have the name 'a\.b'"):
        open_torch(save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}))
    with pytest.raises(InputError, match="names beyond"):
        open_torch(save({"x" * 5000: torch.ones(1)}))
    with pytest.raises(InputError, match="surrogate"):
        open_torch(save({"\ud800": torch.ones(1)}))


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 5}])
def test_part_of_a_larger_file(save: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """The entries of a .distcp file are such."""
    tensor = torch.randn(5, 4)
    inner = save({"w": tensor}, **options).read_bytes()
    outer = tmp_path / "__0_0.distcp"
    outer.write_bytes(b"x" * 1000 + inner + b"y" * 500)
    opened = open_torch(outer, 1000, len(inner))
    span = opened.span("w")
    assert torch.equal(opened.read("w"), tensor) and span is not None
    assert outer.read_bytes()[span.offset : span.offset + span.length] == bits(tensor)
    with pytest.raises(InputError):
        open_torch(outer, 1000, len(inner) // 2)


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_distributed_metadata(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": {"w": torch.randn(4, 3)}}, checkpoint_id=tmp_path / "d", no_dist=True)
    metadata = read_pickle(tmp_path / "d" / ".metadata")
    assert metadata.name == "Metadata"
    assert metadata.attributes["state_dict_metadata"]["model.w"].attributes["size"] == (4, 3)
    ((_, where),) = metadata.attributes["storage_data"].items()
    info = where.attributes
    opened = open_torch(tmp_path / "d" / info["relative_path"], info["offset"], info["length"])
    assert opened.tensors["object"].shape == (4, 3)


def test_view_of_a_legacy_storage(tmp_path: Path) -> None:
    """Files of torch 0.x could hold storages that are parts of other storages."""
    values = torch.arange(10, dtype=torch.float32)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\n"
    view = b"X\x01\x00\x00\x001K\x04K\x03\x87"  # key, offset, size
    data = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor\n(" + storage + view + b"tQK\x01(K\x02t(K\x01ttRs."
    )
    opened = open_torch(as_legacy(tmp_path / "a.pt", data, {"0": bits(values)}))
    assert opened.read("w").flatten().tolist() == [5.0, 6.0]
    assert torch.equal(torch.load(tmp_path / "a.pt")["w"], values[5:7])


def test_without_checksums(tmp_path: Path) -> None:
    """torch can leave the checksums 0; zipfile alone would refuse such a file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.eye(2)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    check(tmp_path / "a.pt", {"w": torch.eye(2)})


# ------------------------------------------------------------------------------------------------------- how it reads


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lengths: list[int] = []
    original = Source.readinto

    def counted(self: Source, offset: int, buffer: memoryview) -> None:
        lengths.append(len(buffer))
        original(self, offset, buffer)

    monkeypatch.setattr(Source, "readinto", counted)
    return lengths


def test_a_file_beyond_4_gib_is_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data():  # reserves the space without writing it: a sparse file, with zip64 offsets
        torch.save({"big": torch.empty(3 << 18, 2048), "after": torch.empty(4, 4)}, path)
    assert path.stat().st_size > 6 << 30
    lengths = count_bytes(monkeypatch)
    opened = open_torch(path)
    assert sum(lengths) < 300_000  # zipfile looks for the end of the archive in the last 64 KB
    span, after = opened.span("big"), opened.span("after")
    assert span is not None and after is not None and after.offset > 6 << 30
    with open(path, "r+b") as file:
        file.seek(span.offset + 700_000 * 2048 * 4)
        file.write(bits(torch.arange(2048, dtype=torch.float32)))
        file.seek(after.offset)
        file.write(bits(torch.eye(4)))
    lengths.clear()
    rows = opened.read("big", 699_999, 700_002)
    assert lengths == [3 * 2048 * 4]
    assert torch.equal(rows[1], torch.arange(2048, dtype=torch.float32)) and not rows[0].any() and not rows[2].any()
    assert torch.equal(opened.read("after"), torch.eye(4))


@pytest.mark.parametrize("legacy", [False, True])
def test_opening_and_reading_touch_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    path, base = tmp_path / "a.pt", torch.randn(4000, 1000)
    tensors = {"w": base, "slice": base[:, 10:20], "t": torch.randn(100, 100).T}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    lengths = count_bytes(monkeypatch)
    opened = open_torch(path)
    assert sum(lengths) < 250_000
    lengths.clear()
    assert torch.equal(opened.read("w", 100, 150), base[100:150])
    assert lengths == [50 * 4000]
    lengths.clear()
    assert torch.equal(opened.read("slice", 100, 150), base[100:150, 10:20])
    assert lengths == [49 * 4000 + 40]


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "a.pt")
    code = (
        "import sys; from pathlib import Path; from dora_tools.containers.torch_pickle import open_torch\n"
        f"opened = open_torch(Path({str(tmp_path / 'a.pt')!r}))\n"
        "assert [*opened.tensors] == ['w', 'b'] and opened.span('b').length == 6\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_many_threads(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(300, 200).half(), "float": torch.randn(300, 200), "turned": torch.randn(200, 300).T,
        "ints": torch.randint(-5, 5, (300, 200)),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    opened = open_torch(tmp_path / "a.pt")
    wrong: list[int] = []

    def work(seed: int) -> None:
        kept = []
        for step in range(200):
            name = list(tensors)[(seed + step) % 4]
            start = (seed * 37 + step * 11) % 290
            wanted = expected(tensors[name])[start : start + 10]
            out = torch.empty_like(wanted) if step % 2 else None
            kept.append((opened.read(name, start, start + 10, out), wanted))
        wrong.extend(1 for got, wanted in kept if not torch.equal(got, wanted))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEY = st.text() | st.integers() | st.tuples(st.text(), st.booleans())
PLAIN: st.SearchStrategy[Any] = st.deferred(
    lambda: (
        LEAF
        | st.builds(bytearray, st.binary())
        | st.complex_numbers(allow_nan=False)
        | st.sets(KEY)
        | st.frozensets(KEY)
        | st.lists(PLAIN, max_size=4)
        | st.tuples(PLAIN, PLAIN)
        | st.dictionaries(KEY, PLAIN, max_size=4)
        | st.dictionaries(KEY, PLAIN, max_size=4).map(collections.OrderedDict)
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_values_are_what_they_were(tmp_path: Path, value: Any, protocol: int) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(path) == value


@pytest.mark.parametrize(
    "data, value",
    [
        (b"(lp0\nI1\naL2L\na.", [1, 2]),
        (b"(dp0\nS'a'\nI01\ns.", {"a": True}),
        (b"(S'a'\nI1\nS'b'\n(F1.5\nNtd.", {"a": 1, "b": (1.5, None)}),
        (b"\x80\x04(K\x01K\x02\x91.", frozenset({1, 2})),
        (b"\x80\x04\x8f(K\x01K\x02\x90.", {1, 2}),
        (b"ccollections\nOrderedDict\n((l(lS'a'\naI1\naatR.", {"a": 1}),
        (b"\x80\x05\x96\x02\x00\x00\x00\x00\x00\x00\x00ab.", bytearray(b"ab")),
        (b"\x80\x02U\x02\xc3\xb6.", "ö"),
    ],
)
def test_instructions(tmp_path: Path, data: bytes, value: Any) -> None:
    (tmp_path / "a.pkl").write_bytes(data)
    read = read_pickle(tmp_path / "a.pkl")
    assert read == value and type(read) is type(value)


# ------------------------------------------------------------------------------------------------- what is never run


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that appears, or the module that is imported, if anything in a pickle runs."""
    path = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Inner:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    assert not path.exists(), "something in the pickle was run"
    assert "canary_module" not in sys.modules


class Reduced:
    def __init__(self, *value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return self.value


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(path: Path) -> dict[str, bytes]:
    command, code = f"touch {path}", f"open({str(path)!r}, 'w').close()"
    shell, python, dumps = text(command), text(code), pickle.dumps
    evil = dumps(Reduced(eval, (code,)), 2)[2:-1]
    getter = Reduced(getattr, (Reduced(__import__, ("os",)), "system"))
    getattr_os = b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n"
    from_type = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n"
    storage = b"\x80\x02(" + text("storage")
    made = b"cbuiltins\nobject\n)\x81"
    return {
        "os.system": dumps(Reduced(os.system, (command,)), 2),
        "os.system by name": b"\x80\x02cos\nsystem\n" + shell + b"\x85R.",
        "eval": dumps(Reduced(eval, (code,)), 2),
        "exec protocol 0": dumps(Reduced(exec, (code,)), 0),
        "exec protocol 5": dumps(Reduced(exec, (code,)), 5),
        "subprocess": dumps(Reduced(subprocess.Popen, (["touch", str(path)],)), 4),
        "nested reduce": dumps(Reduced(map, (eval, [code])), 2),
        "list of a map": dumps(Reduced(list, (Reduced(map, (eval, [code])),)), 2),
        "set of a map": dumps(Reduced(set, (Reduced(map, (eval, [code])),)), 4),
        "dict of a map": dumps(Reduced(collections.OrderedDict, (Reduced(map, (eval, [code])),)), 4),
        "Size of a map": dumps(Reduced(torch.Size, (Reduced(map, (eval, [code])),)), 4),
        "call of a call": getattr_os + text("__call__") + b"\x86R" + shell + b"\x85R.",
        "getattr of import": dumps(Reduced(getter.value[0], getter.value[1]), 2)[:-1] + shell + b"\x85R.",
        "INST": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "INST os": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + command.encode() + b"'\no.",
        "OBJ class": b"(csubprocess\nPopen\n" + text(f"touch {path}") + b"NNNNN\x88\x88o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n]" + text("touch") + b"a" + text(str(path)) + b"a\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + python + b"\x85}\x92.",
        "STACK_GLOBAL dotted": b"\x80\x04" + text("canary_module") + text("Inner.Deeper") + b"\x93)\x81.",
        "STACK_GLOBAL dotted builtin": b"\x80\x04"
        + text("builtins")
        + text("eval.__call__")
        + b"\x93"
        + python
        + b"\x85R.",
        "GLOBAL import": b"\x80\x02ccanary_module\nInner\n.",
        "global with dots": b"\x80\x04" + text("torch.hub") + text("os.system") + b"\x93" + shell + b"\x85R.",
        "py2 names": b"\x80\x02c__builtin__\neval\n" + python + b"\x85R.",
        "torch storage loader": dumps(Reduced(torch.storage._load_from_bytes, (dumps(Reduced(exec, (code,))),)), 2),
        "set then BUILD": b"\x80\x02" + made + b"}" + text("__setstate__") + b"cos\nsystem\nsb" + shell + b"b.",
        "BUILD on a class": b"\x80\x02ccanary_module\nInner\n}" + text("x") + b"K\x01sb.",
        "BUILD on allowed": b"\x80\x02ccollections\nOrderedDict\n}" + text("__new__") + b"cbuiltins\neval\nsb)\x81.",
        "BUILD slots": b"\x80\x02cbuiltins\nobject\n)\x81N}" + text("__class__") + b"cbuiltins\neval\ns\x86b.",
        "BUILD __dict__": b"\x80\x02cbuiltins\nobject\n)\x81}" + text("__reduce__") + b"cos\nsystem\nsb.",
        "BUILD with a call": b"\x80\x02ccollections\nOrderedDict\n)R" + evil + b"b.",
        "BUILD on a tuple": b"\x80\x02)}" + text("x") + b"K\x01sb.",
        "BUILD twice": b"\x80\x02cbuiltins\nobject\n)\x81}" + text("x") + b"K\x01sb}b.",
        "setattr": b"\x80\x02cbuiltins\nsetattr\ncbuiltins\nobject\n" + text("__hash__") + b"cos\nsystem\n\x87R.",
        "key with hash": b"\x80\x02}cbuiltins\nobject\n)\x81}" + text("__hash__") + b"cos\nsystem\nsbK\x01s.",
        "SETITEM on an object": b"\x80\x02cos\nenviron\n" + text("X") + text("y") + b"s.",
        "APPEND on an object": b"\x80\x02csys\npath\n" + text("y") + b"a.",
        "APPEND on a call": b"\x80\x02cbuiltins\neval\n)R" + python + b"a.",
        "items of two kinds": b"\x80\x02cbuiltins\neval\n)R" + python + b"aK\x01K\x02s.",
        "ADDITEMS on a dict": b"\x80\x04}(K\x01\x90.",
        "EXT1": b"\x80\x02\x82\xf0" + shell + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\x00" + shell + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + shell + b"\x85R.",
        "persistent id": b"\x80\x02" + shell + b"Q.",
        "persistent id of protocol 0": b"P" + command.encode() + b"\n.",
        "persistent module": b"\x80\x02(" + text("module") + b"ccanary_module\nInner\nNNtQ.",
        "storage of a class": storage + b"ccanary_module\nInner\n" + text("0") * 2 + b"K\x00tQ.",
        "storage of a call": storage + evil + text("0") * 2 + b"K\x00tQ.",
        "rebuild from type": from_type + b"(cos\nsystem\nctorch\nTensor\n" + shell + b"\x85}tR.",
        "rebuild of a rebuild": from_type + b"(cbuiltins\neval\nctorch\nTensor\n" + python + b"\x85NtR.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\ncbuiltins\nobject\nNtR.",
        "newobj by name": b"\x80\x02ccopyreg\n__newobj__\ncos\nsystem\n" + shell + b"\x86R.",
        "newobj_ex by name": b"\x80\x02ccopyreg\n__newobj_ex__\ncbuiltins\nexec\n" + python + b"\x85}\x87R.",
        "codecs": b"\x80\x02c_codecs\nencode\n" + python + text("canary_module") + b"\x86R.",
        "codecs decode": dumps(Reduced(__import__("codecs").decode, (b"x", "canary_module")), 2),
        "copyreg registry": b"\x80\x02ccopyreg\nadd_extension\n" + text("os") + shell + b"K\x05\x87R0\x82\x05.",
        "partial": dumps(Reduced(__import__("functools").partial(os.system, command), ()), 2),
        "reduce in a key": b"\x80\x02}" + evil + b"K\x01s.",
        "reduce in a set": b"\x80\x04\x8f(" + evil + b"\x90.",
        "size is a call": tensor_pickle().replace(b"K\x02K\x03\x86", evil),
    }  # fmt: skip


HOSTILE = sorted(hostile(Path("/nowhere")))
REFUSED = {
    "BUILD on a class", "BUILD on allowed", "BUILD on a tuple", "BUILD twice", "set then BUILD", "SETITEM on an object",
    "APPEND on an object", "items of two kinds", "ADDITEMS on a dict", "EXT1", "EXT2", "EXT4", "persistent id",
    "persistent id of protocol 0", "storage of a class", "storage of a call", "copyreg registry", "size is a call",
}  # fmt: skip


@pytest.mark.parametrize("container", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs(tmp_path: Path, canary: Path, name: str, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import copyreg

    for code in (0x05, 0xF0):  # what some library may have registered, and pickle already looked up
        monkeypatch.setitem(copyreg._inverted_registry, code, ("os", "system"))  # type: ignore[attr-defined]
        monkeypatch.setitem(copyreg._extension_cache, code, os.system)  # type: ignore[attr-defined]
    data = hostile(canary)[name]
    path = tmp_path / "a.pt"
    try:
        if container == "plain":
            path.write_bytes(data)
            read_pickle(path)
        else:
            opened = (as_zip if container == "zip" else as_legacy)(path, data)
            found = open_torch(opened).metadata["object"]
            repr(found)
        assert name not in REFUSED
    except InputError as error:
        assert name in REFUSED, error
        assert str(path) in str(error) and str(error).endswith(".")


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """Otherwise the tests above prove nothing: with pickle.loads most of them do run."""
    (tmp_path / "all").write_bytes(pickle.dumps([hostile(tmp_path / str(n))[name] for n, name in enumerate(HOSTILE)]))
    code = (
        "import contextlib, pickle\n"
        "for data in pickle.load(open('all', 'rb')):\n"
        "    with contextlib.suppress(BaseException):\n"
        "        pickle.loads(data)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, check=True)
    assert sum((tmp_path / str(n)).exists() for n in range(len(HOSTILE))) >= 12


def test_inert_says_what_it_would_have_been(tmp_path: Path, canary: Path) -> None:
    pickles = hostile(canary)

    def found(name: str) -> Any:
        return open_torch(as_zip(tmp_path / "a.pt", pickles[name])).metadata["object"]

    command = found("os.system")
    assert (command.name, command.args) == ("system", (f"touch {canary}",)) and command.module in ("os", "posix", "nt")
    inner = found("call of a call")
    assert inner.qualified == ".()" and inner.args[0].name == "getattr" and inner.args[1] == f"touch {canary}"
    assert found("NEWOBJ").args == (["touch", str(canary)],)
    assert found("STACK_GLOBAL dotted").name == "Inner.Deeper"
    assert found("list of a map").name == "list"
    assert found("reconstructor").qualified == "subprocess.Popen"
    assert found("newobj by name").qualified == "os.system"
    assert found("py2 names").qualified == "builtins.eval"
    assert found("APPEND on a call").items == [f"open({str(canary)!r}, 'w').close()"]


def test_memory_and_recursion_bombs(tmp_path: Path) -> None:
    deep = b"\x80\x02)" + b"\x85" * 300_000
    doubling = b"\x80\x02)" + b"2\x86" * 60  # DUP, TUPLE2: 2 ** 60 leaves
    calls = b"\x80\x02cos\nsystem\n)R" + b")R" * 20_000
    huge = struct.pack("<Q", 1 << 50)
    storage = b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n"
    bombs = {
        "deep": deep + b".",
        "deep key": b"\x80\x02}" + deep[2:] + b"K\x01s.",
        "wide key": b"\x80\x02}" + doubling[2:] + b"K\x01s.",
        "in a set": b"\x80\x04\x8f(" + deep[2:] + b"\x90.",
        "frozen": b"\x80\x04(" + deep[2:] + b"\x91.",
        "as a dict": b"\x80\x04(" + deep[2:] + b"Nd.",
        "called": b"\x80\x02cbuiltins\nset\n(" + deep[2:] + b"l\x85R.",
        "size": tensor_pickle().replace(b"K\x02K\x03\x86", doubling[2:]),
        "named": storage + doubling[2:] + text("c") + b"K\x00tQ.",
        "bytes": b"\x80\x04\x8e" + huge + b".",
        "bytearray": b"\x80\x05\x96" + huge + b".",
        "frame": b"\x80\x04\x95" + huge + b"N.",
        "text": b"\x80\x04\x8d" + huge + b".",
        "copies": b"\x80\x02(" + b"N" * 1000 + b"lq\x000" + b"cbuiltins\nlist\nh\x00\x85R0" * 2000 + b"N.",
        "tower": b"\x80\x02)" + b"2\x86" * 60 + b"Nb.",
        "digits": b"I" + b"9" * 100_000 + b"\n.",
        "lists": b"\x80\x02" + b"](" * 3000 + b"e" * 3000 + b".",
        "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
        "calls": calls + b".",
    }
    harmless = {"deep", "memo", "calls", "frame"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "MAX_COPIES", 1_900_000)
        for name, data in bombs.items():
            for make in (as_zip, as_legacy):
                try:
                    open_torch(make(tmp_path / "a.pt", data))
                    assert name in harmless, name
                except InputError as error:
                    assert name not in harmless - {"deep", "frame"}, error
                    assert len(str(error)) < 800


# ------------------------------------------------------------------------------------------------- what is refused


def refused(path: Path, match: str, kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind, match=match) as caught:
        open_torch(path)
    message = str(caught.value)
    assert str(path) in message and message.endswith((".", "?")) and type(caught.value) is kind


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    torch.save({"w": torch.randn(4, 3), "b": torch.ones(3)}, tmp_path / "good.pt")
    return (tmp_path / "good.pt").read_bytes()


def rezip(source: bytes, path: Path, edit: Any, **options: Any) -> Path:
    """The archive again, with its members as ``edit`` (a dict of them) leaves them."""
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_zip_members(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.pt"
    assert open_torch(rezip(good, path, lambda m: None)).tensors.keys() == {"w", "b"}
    refused(rezip(good, path, lambda m: None, compression=zipfile.ZIP_DEFLATED), "compressed", UnsupportedError)
    refused(rezip(good, path, lambda m: m.update({"good/byteorder": b"big"})), "byte order", UnsupportedError)
    refused(
        rezip(good, path, lambda m: m.update({"good/code/x.py": b"", "good/constants.pkl": b""})),
        "TorchScript",
        UnsupportedError,
    )
    refused(rezip(good, path, lambda m: m.pop("good/data.pkl")), "0 files named data.pkl")
    refused(rezip(good, path, lambda m: m.update({"other/data.pkl": b"N."})), "2 files named data.pkl")
    refused(rezip(good, path, lambda m: m.pop("good/data/1")), "no member 'good/data/1'")
    refused(rezip(good, path, lambda m: m.update({"good/data/1": b"xx"})), "has 2 bytes, but its tensors need 12")
    for name in ("../evil", "/evil", "good/../../evil"):
        refused(rezip(good, path, lambda m, name=name: m.update({name: b""})), "leads out of the archive")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("good/version", b"4")
    refused(path, "leads out|same name")
    rezip(good, path, lambda m: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("good/data/0", b"\0" * 48)
    refused(path, "same name")
    assert open_torch(rezip(good, path, lambda m: m.pop("good/byteorder"))).tensors  # torch before 2.1
    assert open_torch(as_zip(path, b"\x80\x02}.", prefix="")).metadata["object"] == {}


def patched(data: bytes, path: Path, at: int, value: bytes) -> Path:
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    return path


def test_zip_headers(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.pt"
    central = good.index(b"PK\1\2")
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        at = archive.getinfo("good/data/0").header_offset
        data_pkl = archive.getinfo("good/data.pkl")
    refused(patched(good, path, at, b"XX"), "local header of 'good/data/0'")
    refused(patched(good, path, at + 30, b"X"), "local header")
    refused(patched(good, path, at + 28, b"\xff\xff"), "local header|ends at")
    refused(patched(good, path, central + 8, b"\x09"), "encrypted", UnsupportedError)
    refused(patched(good, path, central + 24, b"\xff\xff\xff\x7f"), "sizes of")
    refused(patched(good, path, central + 20, b"\xff\xff\xff\x7f" * 2), "sizes of")
    refused(patched(good, path, central + 10, b"\x0c"), "compressed", UnsupportedError)
    refused(patched(good, path, data_pkl.header_offset + 70, b"\xff"), "checksum|local header")
    refused(patched(good, path, central + 42, b"\xff\xff\xff\x7f"), "local header|ends at")
    for length in (len(good) - 1, len(good) - 30, central, central // 2, 100, 30, 4):
        path.write_bytes(good[:length])
        refused(path, "damaged|not a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_pickle, "MAX_PICKLE", 10)
        path.write_bytes(good)
        refused(path, "at most 10 are read", UnsupportedError)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    refused(path, "is empty")
    for data in (
        b"\0",
        b"random bytes" * 50,
        os.urandom(5000),
        b"\x80\x02}.",
        pickle.dumps({"w": [1.0]}),
        b"GGUF\3\0\0\0",
    ):
        path.write_bytes(data)
        refused(path, "not a file of torch.save")
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    refused(path, "tar archive", UnsupportedError)
    refused(tmp_path / "missing.pt", "cannot be read")
    refused(tmp_path, "not an ordinary file")


def test_legacy_headers(tmp_path: Path) -> None:
    path, values = tmp_path / "a.pt", bits(torch.arange(6, dtype=torch.float32))
    data = tensor_pickle()
    good = as_legacy(path, data, {"0": values}).read_bytes()
    assert open_torch(path).read("w").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    path.write_bytes(good[:-1])
    refused(path, "storage '0' has 6 elements and 24 bytes")
    path.write_bytes(good[:-26])
    refused(path, "cut off")
    path.write_bytes(good[: len(LEGACY_HEAD) + 20])
    refused(path, "EOFError")
    path.write_bytes(good[:-32] + struct.pack("<q", 5) + good[-24:])
    refused(path, "has 5 elements")
    path.write_bytes(good[:-32] + struct.pack("<q", -1) + good[-24:])
    refused(path, "has -1 elements")
    refused(as_legacy(path, data, {"1": values}), "list of its storages")
    refused(as_legacy(path, data, {}), "list of its storages")
    refused(as_legacy(path, data, {"0": values, "1": values}), "list of its storages")
    path.write_bytes(good.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    refused(path, "little_endian", UnsupportedError)
    path.write_bytes(good.replace(b"M\xe9\x03", b"M\xe8\x03", 1))
    refused(path, "protocol 1000", UnsupportedError)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"offset": 1}, "needs 28 bytes of the storage '0', which has 24"),
        ({"offset": -1}, "-1 is no size"),
        ({"offset": 1 << 62}, "is no size"),
        ({"offset": (1 << 62) - 1}, "needs"),
        ({"offset": "0"}, "'0' is no size"),
        ({"offset": True}, "True is no size"),
        ({"offset": 0.0}, "is no size"),
        ({"size": (3, 3)}, "needs 36 bytes"),
        ({"size": (-2, -3)}, "-2 is no size"),
        ({"size": (1 << 61, 1 << 61)}, "needs"),
        ({"size": (1 << 61, 1 << 61), "stride": (0, 0)}, "would repeat"),
        ({"size": (1 << 40,), "stride": (0,)}, "would repeat"),
        ({"size": (6,), "stride": (3, 1)}, "1 sizes and 2 strides"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "65 sizes"),
        ({"stride": (-3, 1)}, "-3 is no size"),
        ({"stride": (1 << 61, 1)}, "needs"),
        ({"stride": (3, 2)}, "needs 32 bytes"),
        ({"stride": 3}, "TypeError"),
        ({"numel": -6}, "-6 is no size"),
        ({"numel": 7}, "24 bytes, but its tensors need 28"),
        ({"numel": 1 << 60}, "24 bytes, but its tensors need"),
        ({"kind": "Evil"}, "unknown type <torch.EvilStorage>"),
    ],
)
def test_tensors_stay_in_their_storage(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    refused(as_zip(tmp_path / "a.pt", tensor_pickle(**options), {"0": bytes(24)}), match)


def test_what_fits_is_read(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({}, (2, 3)),
        ({"size": (0, 1 << 50), "offset": 6}, (0, 1 << 50)),
        ({"size": (1, 1), "stride": (1 << 40, 1 << 40)}, (1, 1)),
    ]
    for options, shape in cases:
        opened = open_torch(as_zip(tmp_path / "a.pt", tensor_pickle(**options), {"0": bytes(24)}))
        assert opened.tensors["w"].shape == shape and opened.read("w").shape == shape


def test_a_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.randn(1000, 10)}, path)
    opened = open_torch(path)
    os.truncate(path, 5000)
    with pytest.raises(InputError, match="cut off"):
        opened.read("w", 900, 1000)


# ------------------------------------------------------------------------------------------------ any damage at all


def small(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    namespace = argparse.Namespace(rank=8, tags={"a"}, type=Settings, raw=b"\xff")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    obj = {
        "state_dict": collections.OrderedDict(w=base, t=base.T, b=torch.nn.Parameter(torch.ones(3))),
        "hyper": namespace,
    }
    torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


SMALL = {"legacy": small(True), "zip": small(False)}
with zipfile.ZipFile(io.BytesIO(SMALL["zip"])) as _archive:
    MEMBERS = {name: _archive.read(name) for name in _archive.namelist()}
DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.integers(0, 255), st.sampled_from("=+-")), min_size=1, max_size=6
)
EXAMPLES = int(os.environ.get("TORCH_PICKLE_EXAMPLES", "250"))


def damaged(data: bytes, damage: list[tuple[int, int, str]], cut: int | None) -> bytes:
    changed = bytearray(data)
    for place, value, how in damage:
        at = place % (len(changed) + 1)
        changed[at : at + (how != "+")] = b"" if how == "-" else bytes([value])
    return bytes(changed[: cut and cut % len(data)])


@pytest.mark.parametrize("what", ["zip", "legacy", "pickle", "pickle in legacy"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, cut=st.none() | st.integers(0, 1 << 30), word=st.sampled_from([b"", b"canary_module", b"os"]))
def test_damage_is_an_input_error_or_harmless(
    tmp_path: Path, what: str, damage: list[tuple[int, int, str]], cut: int | None, word: bytes
) -> None:
    path = tmp_path / "a.pt"
    imported = set(sys.modules)
    if what in SMALL:
        path.write_bytes(damaged(SMALL[what], damage, cut))
    else:
        data = damaged(MEMBERS["archive/data.pkl"], damage, cut)
        data = data.replace(b"argparse", word) if word else data
        storages = {name.rsplit("/", 1)[1]: value for name, value in MEMBERS.items() if "/data/" in name}
        (as_legacy if "legacy" in what else as_zip)(path, data, storages)
    try:
        opened = open_torch(path)
        repr(opened.metadata)
        for name, info in opened.tensors.items():
            assert opened.read(name).numel() == info.numel
    except InputError as error:
        assert str(error).startswith(str(path)) and "\0" not in str(error)
    assert not {name for name in set(sys.modules) - imported if not name.startswith("encodings.")}
