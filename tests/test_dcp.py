"""Directories of torch.distributed.checkpoint: read as torch reads them, lazily, and without running anything."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.multiprocessing.spawn import spawn

from dora_tools.checkpoint import blocks
from dora_tools.containers.dcp import DcpCheckpoint, is_dcp, open_dcp
from dora_tools.containers.pickles import Inert
from dora_tools.containers.source import Source
from dora_tools.errors import InputError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = 4
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + prod(shape))
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


def plain() -> dict[str, Any]:
    """A training state as users save it: nested, with what is no tensor."""
    return {
        "state_dict": {
            "model.0.lora.A": values(4, 6),
            "model.0.lora.m": values(7, dtype=torch.bfloat16),
            "model.conv": values(3, 4, 5, dtype=torch.float16),
            "turned": values(6, 4).T,
            "channels_last": values(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "part": values(9, 8)[2:5, 1:4],
            "repeated": torch.ones(1, 3).expand(4, 3),
            "parameter": torch.nn.Parameter(values(2, 2)),
            "step": torch.tensor(3.5),
            "empty": torch.empty(0, 4),
            "hollow": torch.empty(4, 0),
            **{str(dtype): values(3, 4, dtype=dtype) for dtype in DTYPES},
        },
        "epoch": 7,
        "callbacks": [{"best": 0.5}, values(2)],
    }


def flat(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {path: state.detach()}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {k: v for key, part in parts for k, v in flat(part, f"{path}.{key}" if path else str(key)).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def check(opened: DcpCheckpoint, wanted: dict[str, torch.Tensor]) -> None:
    """All values, all row ranges of interest, into a given tensor too, and the spans' bytes."""
    for name, tensor in wanted.items():
        info = opened.tensors[name]
        kept = tensor if not (tensor.is_floating_point() and tensor.dtype != torch.float64) else tensor.float()
        assert info.shape == tuple(tensor.shape), name
        rows = kept.reshape(info.rows, info.width)
        read = opened.read(name)
        assert read.dtype == rows.dtype and read.shape == rows.shape and bits(read) == bits(rows), name
        for start, stop in {(0, 1), (1, info.rows), (info.rows // 2, info.rows // 2 + 2), (info.rows, info.rows)}:
            assert bits(opened.read(name, start, stop)) == bits(rows[start:stop]), (name, start, stop)
            out = torch.empty_like(rows[start:stop])
            assert opened.read(name, start, stop, out) is out or not out.numel()
            assert bits(out) == bits(rows[start:stop]), (name, start, stop)
        span = opened.span(name)
        if span is not None:
            data = span.path.read_bytes()[span.offset : span.offset + span.length]
            assert data == bits(tensor), name


def saved(folder: Path, state: dict[str, Any] | None = None, **options: Any) -> Path:
    writer = FileSystemWriter(folder, **options)
    save(plain() if state is None else state, storage_writer=writer, no_dist=True)
    return folder


@pytest.mark.parametrize("options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}])
def test_one_process(tmp_path: Path, options: dict[str, Any]) -> None:
    opened = open_dcp(saved(tmp_path / "one", **options))
    wanted = flat(plain())
    assert opened.tensors.keys() == wanted.keys() and "state_dict.model.0.lora.A" in wanted
    assert {info.file for info in opened.tensors.values()} == {"one"}
    check(opened, wanted)
    assert opened.span("state_dict.model.conv") is not None and opened.span("state_dict.channels_last") is None
    assert {name: read() for name, read in opened.metadata["objects"].items()} == {"epoch": 7, "callbacks.0.best": 0.5}
    assert opened.metadata["opaque"] == {} and "meta" not in opened.metadata


def test_more_entries_than_stay_open(tmp_path: Path) -> None:
    tensors = {f"t{i}": values(2, 2, seed=i) for i in range(300)}
    opened = open_dcp(saved(tmp_path, tensors, single_file_per_rank=False))
    for _ in range(2):
        check(opened, tensors)
    assert len(os.listdir("/proc/self/fd")) < 250 if Path("/proc/self/fd").exists() else True


# --- several ranks


def sharded_state() -> dict[str, tuple[torch.Tensor, str]]:
    """name → tensor, and how it is dealt out over a mesh of 2 × 2: "0r" is dim 0 over the first axis, …"""
    shapes = {"even": (8, 4), "uneven": (5, 7), "few": (1, 3), "one": (9,), "cube": (3, 5, 6), "long": (2, 2, 3, 5)}
    state = {
        f"{name}.{how}": (values(*shape), how)
        for name, shape in shapes.items()
        for how in ("0r", "r0", "1r", "01", "10", "00", "r2", "02", "12", "rr")
        if all(c == "r" or int(c) < len(shape) for c in how)
    }
    state |= {f"{dtype}.{how}": (values(5, 6, dtype=dtype), how) for dtype in DTYPES for how in ("0r", "10")}
    return {**state, "scalar.rr": (torch.tensor(2.5), "rr")}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 7, dtype=torch.bfloat16)
        self.lora_A = torch.nn.Parameter(values(3, 5))
        with torch.no_grad():
            self.linear.weight.copy_(values(7, 5))
            self.linear.bias.copy_(values(7))


def save_sharded(rank: int, folder: str) -> None:
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard as OldShard
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2))
    state: dict[str, Any] = {}
    for name, (tensor, how) in sharded_state().items():
        placements = [Replicate() if c == "r" else Shard(int(c)) for c in how]
        state[name] = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    model = torch.nn.Sequential(Layer(), Layer())
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    first, size = 3 * rank, 3 if rank < RANKS - 1 else 1  # 10 rows; what FSDP saved before there were DTensors
    part = OldShard.from_tensor_and_offsets(values(10, 3)[first : first + size].clone(), [first, 0], rank)
    older = {"weight": init_from_local_shards([part], 10, 3)}
    save({"tensors": state, "model": get_model_state_dict(model), "older": older, "epoch": 3}, checkpoint_id=folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint"
    spawn(save_sharded, (str(folder),), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return folder


def test_several_ranks(sharded: Path) -> None:
    opened = open_dcp(sharded)
    wanted = {f"tensors.{name}": tensor for name, (tensor, _) in sharded_state().items()}
    wanted |= {f"model.{k}": v for k, v in torch.nn.Sequential(Layer(), Layer()).state_dict().items()}
    wanted["older.weight"] = values(10, 3)
    assert opened.tensors.keys() == wanted.keys() and len(list(sharded.glob("*.distcp"))) == RANKS
    check(opened, wanted)
    assert opened.metadata["objects"]["epoch"]() == 3
    counts = {name: len(chunks) for name, chunks in opened.chunks.items()}
    assert counts["tensors.even.01"] == 4 and counts["tensors.even.0r"] == 2 and counts["model.0.linear.weight"] == 4
    assert counts["tensors.few.00"] == 1 and opened.span("tensors.few.00") and opened.span("tensors.even.0r") is None


def test_torch_agrees(sharded: Path) -> None:
    opened = open_dcp(sharded)
    state = {name: torch.zeros(info.shape) for name, info in opened.tensors.items() if info.dtype == "F32"}
    assert len(state) > 40
    load(state, checkpoint_id=sharded, no_dist=True)
    check(opened, state)


def test_threads_read_at_once(sharded: Path) -> None:
    opened = open_dcp(sharded)
    wanted = [(name, tensor) for name, (tensor, _) in sharded_state().items() if tensor.dtype == torch.float32] * 5

    def same(item: tuple[str, torch.Tensor]) -> bool:
        return torch.equal(opened.read(f"tensors.{item[0]}").flatten(), item[1].flatten())

    assert all(result for _, result in blocks(wanted, same, 8))


# --- Lightning

LIGHTNING = """
import sys, torch, lightning
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

class Module(lightning.LightningModule):
    def __init__(self, lora_r=4, lora_alpha=8.0):
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    def configure_model(self):
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, index):
        return self.model(batch[0]).sum()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

if __name__ == "__main__":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=2))
    trainer.save_checkpoint("sharded.ckpt")
    full = {name: value.full_tensor() for name, value in module.state_dict().items()}
    if trainer.global_rank == 0:
        torch.save(full, "full.pt")
"""


def test_lightning_model_parallel(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    (tmp_path / "train.py").write_text(LIGHTNING)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    # gloo's threads sometimes abort the interpreter on its way out, when everything is written
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    opened = open_dcp(tmp_path / "sharded.ckpt")
    full = torch.load(tmp_path / "full.pt")
    check(opened, {f"state_dict.{name}": value for name, value in full.items()})
    assert "state_dict.model.0.weight" in opened.tensors
    meta = opened.metadata["meta"]
    assert meta["hyper_parameters"] == {"lora_r": 4, "lora_alpha": 8.0} and meta["global_step"] == 2
    assert any(name.startswith("optimizer_0.state.") for name in opened.tensors)


def test_meta_is_inert(tmp_path: Path) -> None:
    saved(tmp_path / "a.ckpt", {"state_dict": {"a": values(2, 2)}})
    torch.save({"hyper_parameters": {"r": 4}, "evil": Evil(tmp_path / "canary")}, tmp_path / "a.ckpt" / "meta.pt")
    meta = open_dcp(tmp_path / "a.ckpt").metadata["meta"]
    assert meta["hyper_parameters"] == {"r": 4} and meta["evil"].name == "system"
    assert not (tmp_path / "canary").exists()
    (tmp_path / "a.ckpt" / "meta.pt").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(InputError, match=r"meta\.pt is damaged"):
        open_dcp(tmp_path / "a.ckpt")


# --- laziness


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read of each file."""
    count: dict[str, int] = {}
    real = Source.readinto

    def readinto(self: Source, offset: int, buffer: memoryview) -> None:
        count[self.path.name] = count.get(self.path.name, 0) + len(buffer)
        real(self, offset, buffer)

    monkeypatch.setattr(Source, "readinto", readinto)
    return count


def edit(folder: Path, change: Callable[[Metadata], Any]) -> Path:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    changed = change(metadata)
    path.write_bytes(pickle.dumps(changed if isinstance(changed, Metadata) else metadata))
    return folder


def test_reads_only_what_is_asked_for(tmp_path: Path, counted: dict[str, int]) -> None:
    lora, base = values(16, 64), values(4, 4, dtype=torch.bfloat16)
    folder = saved(tmp_path / "big", {"model": {"lora_A": lora, "base": base}, "epoch": 1})
    real, gap = (folder / "__0_0.distcp").read_bytes(), 1 << 40

    def blow_up(metadata: Metadata) -> None:
        size = torch.Size((1 << 25, 1 << 13))
        metadata.state_dict_metadata["model.base"] = TensorStorageMetadata(
            TensorProperties(torch.bfloat16), size, [ChunkStorageMetadata(torch.Size((0, 0)), size)]
        )
        for index, info in metadata.storage_data.items():
            info.offset, info.length = (0, gap) if index.fqn == "model.base" else (gap + info.offset, info.length)

    edit(folder, blow_up)
    with open(folder / "__0_0.distcp", "wb") as file:  # a terabyte of nothing before the adapter
        file.seek(gap)
        file.write(real)
    opened = open_dcp(folder)
    assert opened.tensors["model.base"].nbytes == 1 << 39
    assert counted == {".metadata": (folder / ".metadata").stat().st_size}
    assert torch.equal(opened.read("model.lora_A"), lora)
    assert counted["__0_0.distcp"] < lora.nbytes + 20_000


def test_rows_read_only_their_chunks(tmp_path: Path, counted: dict[str, int]) -> None:
    tensor = values(20_000, 256)
    opened = open_dcp(write_chunks(tmp_path, tensor, [((i, 0), (5000, 256)) for i in range(0, 20_000, 5000)]))
    assert torch.equal(opened.read("t", 9_990, 10_010), tensor[9_990:10_010])
    assert counted["1.distcp"] + counted["2.distcp"] < 20 * 1024 + 40_000 and counted.keys() & {"0.distcp"} == set()
    before = sum(counted.values())
    opened.read("t", 9_990, 10_010)
    assert sum(counted.values()) - before == 20 * 1024  # entries that are open are not read again


def test_listing_imports_no_torch(sharded: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dora_tools.containers.dcp import open_dcp; "
        "opened = open_dcp(Path(sys.argv[1])); assert len(opened.tensors) > 50 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sharded)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- chunks of any kind

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def write_chunks(folder: Path, tensor: torch.Tensor, boxes: list[Box]) -> Path:
    """A checkpoint of one tensor "t", cut into these boxes, each in a file of its own."""
    chunks, storage = [], {}
    for number, (offsets, sizes) in enumerate(boxes):
        path = folder / f"{number}.distcp"
        torch.save(tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone(), path)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        storage[MetadataIndex("t", offsets, number)] = _StorageInfo(path.name, 0, path.stat().st_size)
    stored = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"t": stored}, storage_data=storage)))
    return folder


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that straight cuts leave of it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        for begin, size in ((0, cut), (cut, sizes[dim] - cut)):
            boxes.append(
                (
                    (*offsets[:dim], offsets[dim] + begin, *offsets[dim + 1 :]),
                    (*sizes[:dim], size, *sizes[dim + 1 :]),
                )
            )
    largest = dict(sorted(boxes, key=lambda box: prod(box[1])))  # of those that begin at one place; others are empty
    return shape, draw(st.permutations(list(largest.items())))


def whole(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether each element is covered once, counted one by one."""
    seen = [index for o, n in boxes for index in product(*(range(a, a + b) for a, b in zip(o, n, strict=True)))]
    return sorted(seen) == sorted(product(*map(range, shape)))


@settings(max_examples=150, deadline=None)
@given(cuts(), st.data())
def test_any_cuts(tmp_path_factory: pytest.TempPathFactory, cut: tuple[Any, list[Box]], data: st.DataObject) -> None:
    shape, boxes = cut
    folder = tmp_path_factory.mktemp("cut")
    tensor = torch.arange(prod(shape), dtype=torch.float32).reshape(shape)
    write_chunks(folder, tensor, boxes)
    assert whole(shape, boxes)
    opened = open_dcp(folder)
    check(opened, {"t": tensor})
    start = data.draw(st.integers(0, opened.tensors["t"].rows))
    stop = data.draw(st.integers(start, opened.tensors["t"].rows))
    assert torch.equal(opened.read("t", start, stop), tensor.reshape(-1, opened.tensors["t"].width)[start:stop])
    place = data.draw(st.integers(0, len(boxes) - 1))
    changed = data.draw(st.sampled_from([boxes[:place] + boxes[place + 1 :], [*boxes[:-1], boxes[place]]]))
    if whole(shape, changed):
        check(open_dcp(write_chunks(folder, tensor, changed)), {"t": tensor})
    else:
        with pytest.raises(InputError, match="some are missing, or overlap"):
            open_dcp(write_chunks(folder, tensor, changed))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 0), (2, 4))], "1 chunks of 't' have 8 elements, and its shape (4, 4) has 16"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "some are missing, or overlap"),
        ([((0, 0), (4, 4)), ((0, 0), (4, 4))], "some are missing, or overlap"),
        ([((0, 0), (4, 5))], "of shape (4, 5) from (0, 0) goes beyond the tensor's shape (4, 4)"),
        ([((3, 0), (2, 4))], "goes beyond"),
        ([], "0 chunks of 't' have 0 elements"),
    ],
)
def test_chunks_that_do_not_fit(tmp_path: Path, boxes: list[Box], message: str) -> None:
    write_chunks(tmp_path, values(4, 4), boxes)
    with pytest.raises(InputError) as caught:
        open_dcp(tmp_path)
    assert message in str(caught.value) and str(tmp_path / ".metadata") in str(caught.value)


# --- hostile and damaged


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def storage(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def each(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            change(info)

    return each


def stored(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda metadata: change(metadata.state_dict_metadata["a"])


class Foreign(Metadata):
    pass


HUGE = torch.Size((1 << 61, 1 << 61))
DAMAGE: list[tuple[Callable[[Any], Any], type[InputError], str]] = [
    (storage(lambda i: setattr(i, "relative_path", "../one.distcp")), InputError, "not a plain file name"),
    (storage(lambda i: setattr(i, "relative_path", "/etc/passwd")), InputError, "not a plain file name"),
    (storage(lambda i: setattr(i, "relative_path", "sub\\one")), InputError, "not a plain file name"),
    (storage(lambda i: setattr(i, "relative_path", "..")), InputError, "not a plain file name"),
    (storage(lambda i: setattr(i, "relative_path", 3)), InputError, "no name"),
    (storage(lambda i: setattr(i, "relative_path", "a\0b")), InputError, "no name"),
    (storage(lambda i: setattr(i, "relative_path", "__9_0.distcp")), InputError, "1 of them are not there"),
    (storage(lambda i: setattr(i, "offset", -1)), InputError, "expected integers from 0"),
    (storage(lambda i: setattr(i, "offset", True)), InputError, "expected integers from 0"),
    (storage(lambda i: setattr(i, "length", 1 << 50)), InputError, "it was cut off"),
    (storage(lambda i: setattr(i, "length", "9")), InputError, "expected integers from 0"),
    (storage(lambda i: setattr(i, "length", 60)), InputError, "is F32 of shape (4, 6), in only 60 bytes"),
    (storage(lambda i: setattr(i, "transform_descriptors", ["zstd"])), UnsupportedError, "compressed or encrypted"),
    (stored(lambda t: setattr(t, "size", torch.Size((4,)))), InputError, "expected 1 dimensions"),
    (stored(lambda t: setattr(t, "size", torch.Size((8, 3)))), InputError, "goes beyond"),
    (stored(lambda t: setattr(t, "size", HUGE)), InputError, "some are missing"),
    (stored(lambda t: setattr(t, "size", [4, 6])), InputError, "expected integers from 0"),
    (stored(lambda t: setattr(t, "size", torch.Size((1,) * 65))), InputError, "at most 64 dimensions"),
    (stored(lambda t: setattr(t, "chunks", None)), InputError, "0 chunks"),
    (stored(lambda t: setattr(t, "chunks", [1])), UnsupportedError, "is a int, expected a ChunkStorageMetadata"),
    (stored(lambda t: setattr(t, "chunks", [Evil(Path("canary"))])), UnsupportedError, "system"),
    (stored(lambda t: setattr(t, "properties", None)), UnsupportedError, "TensorProperties"),
    (stored(lambda t: setattr(t.properties, "dtype", 3)), InputError, "expected one of torch's dtypes"),
    (lambda m: m.storage_data.clear(), InputError, "does not say where 'a' lies from (0, 0)"),
    (lambda m: m.storage_data.update({"a": 1}), UnsupportedError, "is a str, expected a MetadataIndex"),
    (lambda m: setattr(m, "storage_data", None), InputError, "storage_data is a NoneType"),
    (lambda m: setattr(m, "state_dict_metadata", [1]), InputError, "state_dict_metadata is a list"),
    (lambda m: m.state_dict_metadata.update({3: None}), InputError, "3 is no name"),
    (lambda m: m.state_dict_metadata.update({"x\n": None}), InputError, "is no name"),
    (lambda m: m.state_dict_metadata.update({"x": Evil(Path("canary"))}), UnsupportedError, "'x' is <posix.system"),
    (lambda m: m.state_dict_metadata.update({"x": Foreign({})}), UnsupportedError, "Foreign"),
    (lambda m: Foreign(m.state_dict_metadata, storage_data=m.storage_data), UnsupportedError, "Foreign"),
]


@pytest.mark.parametrize(("change", "error", "message"), DAMAGE)
def test_damaged_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, error: type[InputError], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = edit(saved(tmp_path / "one", {"a": values(4, 6)}), change)
    with pytest.raises(error) as caught:
        open_dcp(folder)
    assert message in str(caught.value) and type(caught.value) is error and ".metadata" in str(caught.value)
    assert str(caught.value).isprintable() and str(caught.value).endswith(".")
    assert not (tmp_path / "canary").exists()


def test_nothing_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = saved(tmp_path / "one", {"a": values(4, 6), "object": Evil(canary)})
    edit(folder, lambda metadata: setattr(metadata, "planner_data", Evil(canary)))
    opened = open_dcp(folder)
    assert torch.equal(opened.read("a"), values(4, 6))
    found = opened.metadata["objects"]["object"]()
    assert isinstance(found, Inert) and found.name == "system" and found.args == (f"touch {canary}",)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(UnsupportedError, match="expected a Metadata of"):
        open_dcp(folder)
    torch.save(Evil(canary), folder / "__0_0.distcp")
    assert not canary.exists()


def test_entries_that_are_something_else(tmp_path: Path) -> None:
    def replaced(value: Any) -> DcpCheckpoint:
        folder = write_chunks(tmp_path, values(4, 6), [((0, 0), (4, 6))])
        torch.save(value, folder / "0.distcp")
        size = (folder / "0.distcp").stat().st_size
        return open_dcp(edit(folder, storage(lambda info: setattr(info, "length", size))))

    for value, error, message in [
        (values(6, 4), InputError, r"is F32 of shape \(6, 4\), but .metadata says F32 of shape \(4, 6\)"),
        (values(4, 6).double(), InputError, "is F64 of shape"),
        ({"x": values(4, 6)}, UnsupportedError, "is stored as a dict"),
        (Evil(tmp_path / "canary"), UnsupportedError, "is stored as <posix.system"),
        (values(4, 6).to_sparse(), UnsupportedError, "_rebuild_sparse_tensor"),
    ]:
        opened = replaced(value)
        for use in (opened.read, opened.span):
            with pytest.raises(error, match=message):
                use("t")
    assert not (tmp_path / "canary").exists()
    path = write_chunks(tmp_path, values(4, 6), [((0, 0), (4, 6))]) / "0.distcp"
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(InputError, match=r"Tensor 't' \(bytes 0 to \d+ of .*not a file of torch.save"):
        open_dcp(tmp_path).read("t")


def test_files_that_are_cut_off_missing_or_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    write_chunks(folder, values(4, 6), HALVES)
    entry = folder / "1.distcp"
    data = entry.read_bytes()
    opened = open_dcp(folder)
    entry.write_bytes(data[:-100])
    with pytest.raises(InputError, match=rf"of 1\.distcp, but that has {len(data) - 100} bytes: it was cut off"):
        open_dcp(folder)
    with pytest.raises(InputError, match="Tensor 't'"):
        opened.read("t")
    assert torch.equal(opened.read("t", 0, 2), values(4, 6)[:2])
    entry.rename(tmp_path / "outside.distcp")
    with pytest.raises(InputError, match=r"1 of them are not there: 1\.distcp"):
        open_dcp(folder)
    entry.symlink_to(tmp_path / "outside.distcp")
    with pytest.raises(InputError, match="outside the checkpoint"):
        open_dcp(folder)


HALVES: list[Box] = [((0, 0), (2, 6)), ((2, 0), (2, 6))]


def test_tensors_of_unread_kinds_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", {"a": values(4, 6), "b": values(2)})

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["a"].properties.dtype = torch.qint8  # type: ignore[union-attr]
        metadata.state_dict_metadata["b"].properties.layout = torch.sparse_coo  # type: ignore[union-attr]

    opened = open_dcp(edit(folder, change))
    assert not opened.tensors
    assert opened.metadata["opaque"] == {
        "a": "a tensor of torch.qint8",
        "b": "a tensor of layout ('torch.sparse_coo',)",
    }


def test_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", {"a": values(4, 6)})
    assert is_dcp(folder) and not is_dcp(tmp_path)
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(UnsupportedError, match="use_collectives=False"):
        open_dcp(folder)
    (folder / "__0.metadata").unlink()
    assert is_dcp(folder)
    with pytest.raises(InputError, match="a hidden file"):
        open_dcp(folder)
    writer = HuggingFaceStorageWriter(str(tmp_path / "hf"), save_distributed=True)
    save({"a": values(4, 6)}, storage_writer=writer, no_dist=True)
    assert is_dcp(tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="consolidate_safetensors_files"):
        open_dcp(tmp_path / "hf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    folder = write_chunks(tmp_path_factory.mktemp("small"), values(4, 6), HALVES)
    return folder, (folder / ".metadata").read_bytes(), (folder / "1.distcp").read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".metadata", "1.distcp"]), st.data())
def test_any_damage_is_an_input_error(small: tuple[Path, bytes, bytes], file: str, data: st.DataObject) -> None:
    folder, metadata, entry = small
    (folder / ".metadata").write_bytes(metadata)
    (folder / "1.distcp").write_bytes(entry)
    damaged = bytearray(metadata if file == ".metadata" else entry)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / file).write_bytes(damaged)
    try:
        opened = open_dcp(folder)
        for name in opened.tensors:
            opened.read(name)
            opened.span(name)
    except InputError as error:
        assert str(error).isprintable()
