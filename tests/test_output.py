"""What stands in an output directory besides the merged numbers, and what must not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dora_tools as dt
from dora_tools.cli import main

from . import tiny


def test_force_does_not_leave_other_weights_to_be_loaded(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = ["merge", str(adapter), "--base", str(base), "-o", str(out), "--force"]
    assert main([*run, "--max-shard-size", "1GB"]) == 0
    assert main([*run, "--max-shard-size", "1GB"]) == 0, "the same files may be replaced"
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert main(run) == 2
    assert "other weights (model.safetensors)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_the_adapters_own_tokenizer_travels(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (base / name).write_text("base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_text("adapter")
    plan = dt.merge(adapter, base, tmp_path / "out")
    assert any("saved with the adapter" in note for note in plan.notes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == "adapter"
    assert not (tmp_path / "out" / "vocab.txt").exists(), "half of another tokenizer"


def test_what_training_leaves_behind_does_not_travel(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("train.log", "events.out.tfevents.1.x", "trainer_state.json", "optimizer.pt", "all_results.json"):
        (base / name).write_text("x")
    dt.merge(adapter, base, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} & {p.name for p in base.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_the_manifest_names_the_base_that_was_used(base: Path, adapter: Path, tmp_path: Path) -> None:
    dt.merge(adapter, base, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "dora_tools.json").read_text())["base"]
    assert (said["name"], said["named_by_adapters"]) == (str(base), ["org/tiny"])
    local = tiny.write_adapter(tmp_path / "local", base_model_name_or_path="./somewhere")
    dt.merge(local, base, tmp_path / "other")
    assert "base_model:" not in (tmp_path / "other" / "README.md").read_text(), "a path is no hub id"


def test_adapters_of_different_bases_need_to_be_told_which(adapter: Path, tmp_path: Path) -> None:
    other = tiny.write_adapter(tmp_path / "other", base_model_name_or_path="org/else")
    assert main(["merge", str(adapter), str(other), "-o", str(tmp_path / "out")]) == 2


def with_saved(folder: Path, name: str, array: np.ndarray, **config: object) -> Path:
    arrays = tiny.adapter_arrays() | {f"base_model.model.{name}": array.astype(np.float32)}
    return tiny.write_adapter(folder, arrays, **config)


def test_strength_goes_part_of_the_way_to_a_replacement(base: Path, tmp_path: Path) -> None:
    random, w = np.random.default_rng(5), tiny.base_arrays()
    norm = random.normal(size=8)
    adapter = with_saved(tmp_path / "adapter", "model.norm.weight", norm, modules_to_save=["norm"])
    dt.merge(adapter, base, tmp_path / "out", strength=0.25)
    merged = tiny.read_model(tmp_path / "out")
    np.testing.assert_allclose(merged["model.norm.weight"], w["model.norm.weight"] * 0.75 + norm * 0.25, atol=1e-6)
    grown = with_saved(tmp_path / "grown", "lm_head.weight", random.normal(size=(20, 8)), modules_to_save=["lm_head"])
    assert main(["merge", str(grown), "--base", str(base), "-o", str(tmp_path / "x"), "--strength", "0.5"]) == 4


@pytest.mark.parametrize("has_head", [True, False])
def test_a_classifier_of_another_size_brings_its_labels(tmp_path: Path, has_head: bool) -> None:
    arrays = tiny.base_arrays() | ({"score.weight": np.zeros((2, 8), np.float32)} if has_head else {})
    base = tiny.write_base(tmp_path / "base", arrays, architectures=["LlamaForSequenceClassification"])
    score = np.random.default_rng(5).normal(size=(3, 8)).astype(np.float32)
    adapter = with_saved(tmp_path / "adapter", "score.weight", score, modules_to_save=["score"], task_type="SEQ_CLS")
    dt.merge(adapter, base, tmp_path / "out")
    assert (tiny.read_model(tmp_path / "out")["score.weight"] == score).all()
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == 3


@pytest.mark.parametrize("value", ["nan", "inf", "1e400"])
def test_a_strength_is_a_number(base: Path, adapter: Path, tmp_path: Path, value: str) -> None:
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "o"), "--strength", value]) == 2


def test_an_empty_argument_is_not_the_current_directory(base: Path, adapter: Path) -> None:
    assert main(["merge", str(adapter), "--base", str(base), "-o", ""]) == 2
    assert main(["merge", str(adapter), "--base", "", "-o", "out"]) == 2


def test_an_adapter_is_no_base(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--base", str(adapter), "-o", str(tmp_path / "out")]) == 3
    assert "is an adapter" in capsys.readouterr().err


SLOW = """
import sys, time
import dora_tools.write as w
encode = w.encode
def slow(*a):
    print("writing", flush=True)
    time.sleep(60)
w.encode = slow
from dora_tools.cli import program
sys.exit(program())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped_from_outside(base: Path, adapter: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Nothing stays after a signal that can be caught; what SIGKILL leaves does not stand in the way of a rerun."""
    out = tmp_path / "out"
    slow = SLOW.replace("time.sleep(60)", "time.sleep(1)")
    command = ["merge", str(adapter), "--base", str(base), "-o", str(out)]
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("writing")
    process.send_signal(number)
    code = process.wait(30)
    process.stdout.close()
    if number == signal.SIGKILL:
        assert [p.suffix for p in out.iterdir()].count(".part") > 2
    else:
        assert code == 130
        assert not out.exists()
    assert main(command) == 0
    assert not [p for p in out.iterdir() if p.suffix == ".part"]


def test_two_merges_into_one_directory(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["merge", str(adapter), "--base", str(base), "-o", str(out)]
    slow = SLOW.replace("time.sleep(60)", "time.sleep(2); encode(*a)")
    first = subprocess.Popen([sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.readline()
    assert main(command) in {2, 6}
    first.communicate(timeout=60)
    assert first.returncode == 0
    wanted = tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    assert all(np.allclose(a, wanted[n], atol=1e-5) for n, a in tiny.read_model(out).items())
    assert time.time() - os.stat(out).st_mtime < 60
