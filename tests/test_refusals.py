"""Bad input: one clear sentence, the documented exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dora_tools.cli import main

from . import tiny


class Case:
    """A good base and adapter, to be spoiled by the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny.write_base(root / "base", shards=2)
        self.adapter = tiny.write_adapter(root / "adapter")
        self.out = root / "out"
        self.options: list[str] = []

    def run(self) -> int:
        return main(["merge", str(self.adapter), "--base", str(self.base), "-o", str(self.out), *self.options])

    def shard(self, number: int = 1) -> Path:
        return self.base / f"model-{number:05d}-of-00002.safetensors"


Spoil = Callable[[Case], None]
Q = "base_model.model.model.layers.0.self_attn.q_proj."
UP = "base_model.model.model.layers.1.mlp.up_proj."


def config(**changes: Any) -> Spoil:
    return lambda case: void(tiny.write_adapter(case.adapter, **changes))


def tensors(changes: Callable[[tiny.Arrays], object], **settings: Any) -> Spoil:
    def spoil(case: Case) -> None:
        arrays = tiny.adapter_arrays()
        changes(arrays)
        tiny.write_adapter(case.adapter, arrays, **settings)

    return spoil


def void(_: object) -> None:
    return None


def wrong_base(case: Case) -> None:
    arrays = tiny.base_arrays()
    arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((14, 8), np.float32)
    tiny.write_base(case.base, arrays, shards=2)


def truncated(case: Case) -> None:
    case.shard().write_bytes(case.shard().read_bytes()[:-9])


def index_names(name: str) -> Spoil:
    def spoil(case: Case) -> None:
        (case.root / "x").write_bytes(case.shard().read_bytes())
        index = case.base / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        table["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(table))

    return spoil


def occupied(case: Case) -> None:
    case.out.mkdir()
    (case.out / "thesis.txt").write_text("mine")


def into_base(case: Case) -> None:
    case.out = case.base
    case.options = ["--force"]


def into_adapter(case: Case) -> None:
    case.out = case.adapter


def swapped_shards(case: Case) -> None:
    first, second = case.shard(1).read_bytes(), case.shard(2).read_bytes()
    case.shard(1).write_bytes(second)
    case.shard(2).write_bytes(first)


def duplicate_name(case: Case) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    header += b" " * (-len(header) % 8)
    case.shard().write_bytes(len(header).to_bytes(8, "little") + header + b"\0")


def escaping_link(case: Case) -> None:
    elsewhere = case.root / "elsewhere"
    elsewhere.mkdir()
    shutil.move(case.shard(), elsewhere / "weights")
    case.shard().symlink_to(elsewhere / "weights")


def quantised(case: Case) -> None:
    tiny.write_base(case.base, shards=2, quantization_config={"quant_method": "gptq"})


def integer_weight(case: Case) -> None:
    arrays = tiny.base_arrays()
    arrays["model.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 8), np.uint8)
    tiny.write_base(case.base, arrays, shards=2)


def base_with_nan(case: Case) -> None:
    arrays = tiny.base_arrays()
    arrays["model.layers.0.self_attn.q_proj.weight"][3, 3] = np.nan
    tiny.write_base(case.base, arrays, shards=2)


def too_large_for_half(case: Case) -> None:
    arrays = tiny.base_arrays()
    arrays["model.embed_tokens.weight"][0, 0] = 1e6
    tiny.write_base(case.base, arrays, shards=2)
    case.options = ["--dtype", "float16"]


def options(*given: str) -> Spoil:
    return lambda case: case.options.extend(given)


CASES: dict[str, tuple[int, str, Spoil]] = {
    "wrong base": (4, "12 outputs and 8 inputs", wrong_base),
    "extra key": (4, "no place in the base", tensors(lambda a: a.update({Q + "extra.weight": np.ones(3, np.float32)}))),
    "extra module": (
        4,
        "no place in the base",
        tensors(lambda a: a.update({k.replace("layers.0", "layers.7"): v for k, v in list(a.items()) if Q in k})),
    ),
    "unknown lora key": (3, "lora_diag", tensors(lambda a: a.update({Q + "lora_diag": np.ones(2, np.float32)}))),
    "dora without magnitudes": (3, "use_dora", tensors(lambda a: [a.pop(k) for k in list(a) if "magnitude" in k])),
    "one magnitude missing": (3, "use_dora", tensors(lambda a: a.pop(Q + "lora_magnitude_vector"))),
    "magnitudes without dora": (3, "use_dora", config(use_dora=False)),
    "alpha 0": (3, "lora_alpha = 0", config(lora_alpha=0)),
    "alpha is no number": (3, "not a number", config(lora_alpha="16")),
    "empty factor": (3, "ZeRO-3", tensors(lambda a: a.update({Q + "lora_B.weight": np.zeros((0,), np.float32)}))),
    "flat factor": (3, "ZeRO-3", tensors(lambda a: a.update({Q + "lora_A.weight": np.zeros(16, np.float32)}))),
    "factor missing": (3, "no lora_B", tensors(lambda a: a.pop(Q + "lora_B.weight"))),
    "ranks differ": (
        3,
        "share their rank",
        tensors(lambda a: a.update({Q + "lora_B.weight": np.ones((8, 3), np.float32)})),
    ),
    "magnitude too long": (
        3,
        "9 entries",
        tensors(lambda a: a.update({Q + "lora_magnitude_vector": np.ones(9, np.float32)})),
    ),
    "NaN in lora_B": (3, "NaN or Inf", tensors(lambda a: a[UP + "lora_B.weight"].__setitem__((5, 1), np.nan))),
    "Inf in magnitude": (3, "NaN or Inf", tensors(lambda a: a[UP + "lora_magnitude_vector"].__setitem__(0, np.inf))),
    "NaN in base": (4, "NaN or Inf", base_with_nan),
    "beyond float16": (4, "65504", too_large_for_half),
    "missing shard": (3, "1 of them are not there", lambda case: case.shard().unlink()),
    "truncated shard": (3, "not a complete safetensors file", truncated),
    "empty shard": (3, "not a complete safetensors file", lambda case: void(case.shard().write_bytes(b""))),
    "swapped shards": (3, "Is a shard stale", swapped_shards),
    "duplicate name": (3, "stands twice", duplicate_name),
    "index leaves the directory": (3, "plain file name", index_names("../x")),
    "index names an absolute path": (3, "plain file name", index_names("/etc/passwd")),
    "index is not JSON": (
        3,
        "not the index",
        lambda case: void((case.base / "model.safetensors.index.json").write_text("{")),
    ),
    "link out of the directory": (3, "is a link", escaping_link),
    "config is not an object": (3, "JSON object", lambda case: void((case.base / "config.json").write_text("[]"))),
    "adapter config is not JSON": (
        3,
        "as JSON",
        lambda case: void((case.adapter / "adapter_config.json").write_text("x")),
    ),
    "no adapter config": (
        3,
        "without its adapter_config.json",
        lambda case: (case.adapter / "adapter_config.json").unlink(),
    ),
    "no adapter": (3, "does not exist", lambda case: shutil.rmtree(case.adapter)),
    "empty adapter": (3, "nothing in it", tensors(lambda a: a.clear())),
    "other method": (3, "merge_and_unload", config(peft_type="PSOFT")),
    "pissa": (3, "pissa", config(init_lora_weights="pissa_niter_4")),
    "layer replication": (4, "layer_replication names layer 8", config(layer_replication=[[0, 9]])),
    "trainable tokens": (3, "trainable_tokens_delta", config(trainable_token_indices=[1])),
    "broken pattern": (3, "broken pattern", config(alpha_pattern={"(": 3})),
    "two adapters in one file": (
        3,
        "several adapters",
        tensors(lambda a: a.update({k.replace(".weight", ".other.weight"): v for k, v in list(a.items()) if UP in k})),
    ),
    "quantised base": (3, "gptq", quantised),
    "integer weight": (3, "stored as U8", integer_weight),
    "output not empty": (2, "not empty", occupied),
    "output is the base": (2, "part of the input", into_base),
    "output is the adapter": (2, "not empty", into_adapter),
    "unknown dtype": (2, "float32", options("--dtype", "int4")),
    "bad size": (2, "is not a size", options("--max-shard-size", "big")),
    "too many strengths": (2, "strengths", options("--strength", "1", "--strength", "2")),
    "no such device": (6, "cannot be used", options("--device", "cuda:77")),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, words, spoil = CASES[name]
    case = Case(tmp_path)
    spoil(case)
    before = sorted(tmp_path.rglob("*"))
    assert case.run() == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert "bug in dora-tools" not in said
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_the_same_case_unspoiled_merges(tmp_path: Path) -> None:
    case = Case(tmp_path)
    assert case.run() == 0
    merged, wanted = tiny.read_model(case.out), tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    assert merged.keys() == wanted.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-6 * np.abs(wanted[name]).max())


def test_nonfinite_values_pass_on_request(tmp_path: Path) -> None:
    case = Case(tmp_path)
    CASES["NaN in lora_B"][2](case)
    case.options = ["--allow-nonfinite"]
    assert case.run() == 0
    assert np.isnan(tiny.read_model(case.out)["model.layers.1.mlp.up_proj.weight"]).any(axis=1).sum() == 1


def test_disk_too_small_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert case.run() == 6
    assert "has 1 B free" in capsys.readouterr().err
    assert not case.out.exists()


@pytest.mark.parametrize("failing", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_failing_disk_leaves_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    assert case.run() == 6
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path)

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dora_tools.write.encode", interrupt)
    assert case.run() == 130
    assert not case.out.exists()


def test_zero_rows_stay_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = tiny.base_arrays(), tiny.adapter_arrays()
    base["model.layers.1.mlp.up_proj.weight"][4] = 0
    adapter[UP + "lora_B.weight"][4] = 0
    case = Case(tmp_path)
    tiny.write_base(case.base, base, shards=2)
    tiny.write_adapter(case.adapter, adapter)
    assert case.run() == 0
    assert "1 rows have no direction" in capsys.readouterr().err
    merged = tiny.read_model(case.out)["model.layers.1.mlp.up_proj.weight"]
    assert (merged[4] == 0).all()
    assert np.isfinite(merged).all()


def test_unexpected_extra_file_in_a_forced_output_stays(tmp_path: Path) -> None:
    case = Case(tmp_path)
    occupied(case)
    case.options = ["--force"]
    assert case.run() == 0
    assert (case.out / "thesis.txt").read_text() == "mine"


def test_two_safetensors_without_an_index_are_ambiguous(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    (case.base / "model.safetensors.index.json").unlink()
    assert case.run() == 3
    assert "several checkpoints" in capsys.readouterr().err


def test_tensor_in_two_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    save_file(tiny.base_arrays(), case.shard())
    assert case.run() == 3
    assert "one of the two is stale" in capsys.readouterr().err
