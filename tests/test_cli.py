"""The command line: what it prints, what it writes beside the weights, and the fallbacks of other systems."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import dora_tools as dt
from dora_tools.cli import COMMANDS, main

from . import tiny


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_output_is_the_bases_own_layout(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name, data in {
        "generation_config.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "modeling_custom.py": b"pass",
        "README.md": b"old card",
        "pytorch_model.bin": b"old weights",
        "onnx/model.onnx": b"old weights",
        ".git/config": b"hidden",
    }.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(out), "--stats"]) == 0
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "config.json", "tokenizer.json", "generation_config.json", "1_Pooling/config.json", "modeling_custom.py",
        "README.md", "dora_tools.json",
    }  # fmt: skip
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for path in base.glob("*.safetensors"):
        with safe_open(path, "np") as old, safe_open(out / path.name, "np") as new:
            assert old.keys() == new.keys()
        size = int.from_bytes(path.read_bytes()[:8], "little") + 8
        assert path.read_bytes()[:size] == (out / path.name).read_bytes()[:size]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    arrays = tiny.base_arrays()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    untouched = tiny.read_model(out)["model.norm.weight"]
    assert untouched.tobytes() == arrays["model.norm.weight"].tobytes()

    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model:\n- "org/tiny"\nbase_model_relation: merge\nlibrary_name: transformers\n')
    manifest = json.loads((out / "dora_tools.json").read_text())
    digest = manifest["adapters"][0]["sha256"]["adapter_model.safetensors"]
    assert digest == subprocess.run(
        ["sha256sum", adapter / "adapter_model.safetensors"], capture_output=True, text=True, check=True
    ).stdout.split()[0]  # fmt: skip
    assert {f: b["size"] for f, b in manifest["base"]["files"].items()} == {
        p.name: p.stat().st_size for p in base.glob("*.safetensors")
    }
    wanted = tiny.expected(arrays, tiny.adapter_arrays())
    for module in tiny.MODULES:
        entry = manifest["merged"][f"{module}.weight"]
        w, new = arrays[f"{module}.weight"].astype(np.float64), wanted[f"{module}.weight"]
        assert entry["modules"] == [module]
        assert entry["relative_change"] == pytest.approx(np.linalg.norm(new - w) / np.linalg.norm(w), rel=1e-6)


def test_report_as_json(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out"), "--json", "--stats"]
    assert main([*command, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert dry["dry_run"] is True
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    wet = json.loads(capsys.readouterr().out)
    assert dry["tensors"] == wet["tensors"]
    assert wet["tensors"]["merged"] == {"count": 2, "bytes": 4 * (64 + 96)}
    assert wet["tensors"]["copied"]["count"] == 3
    assert set(wet["relative_change"]) == {f"{m}.weight" for m in tiny.MODULES}
    listed = sum((tmp_path / "out" / f).stat().st_size for f in wet["files"] if f != "dora_tools.json")
    assert listed == wet["bytes"]


def test_dry_run_says_what_would_happen(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), "--base", str(base), "-o", "nowhere", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "merged" in said
    assert "copied" in said
    assert "free" in said
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("size", ["200", "0.5kB", "5GB"])
def test_resharded(base: Path, adapter: Path, tmp_path: Path, size: str) -> None:
    whole = tmp_path / "whole"
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(whole)]) == 0
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(out), "--max-shard-size", size]) == 0
    a, b = tiny.read_model(whole), tiny.read_model(out)
    assert a.keys() == b.keys()
    assert all((a[n] == b[n]).all() for n in a)
    assert (out / "model.safetensors.index.json").exists() == (size != "5GB")


def test_dtype_is_written_into_the_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(out), "--dtype", "fp16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    wanted = tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    for name, array in tiny.read_model(out).items():
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.25, -1.0, 1.0])
@pytest.mark.parametrize("dora", [True, False])
def test_strength_interpolates(adapter: Path, base: Path, tmp_path: Path, strength: float, dora: bool) -> None:
    arrays = tiny.adapter_arrays(dora=dora)
    tiny.write_adapter(adapter, arrays, use_dora=dora)
    before, after = tiny.base_arrays(), tiny.expected(tiny.base_arrays(), arrays)
    dt.merge(adapter, base, tmp_path / "out", strength=strength)
    for name, array in tiny.read_model(tmp_path / "out").items():
        wanted = before[name] + strength * (after[name] - before[name])
        np.testing.assert_allclose(array, wanted, rtol=0, atol=3e-6)


def test_two_adapters_add_up_whatever_their_order(base: Path, tmp_path: Path) -> None:
    first, second = tiny.adapter_arrays(1), tiny.adapter_arrays(2, dora=False)
    a = tiny.write_adapter(tmp_path / "a", first)
    b = tiny.write_adapter(tmp_path / "b", second, use_dora=False)
    dt.merge([a, b], base, tmp_path / "ab", strength=[0.5, 2.0])
    dt.merge([b, a], base, tmp_path / "ba", strength=[2.0, 0.5])
    w = tiny.base_arrays()
    one, two = tiny.expected(w, first), tiny.expected(w, second)
    ab, ba = tiny.read_model(tmp_path / "ab"), tiny.read_model(tmp_path / "ba")
    for name in w:
        wanted = w[name] + 0.5 * (one[name] - w[name]) + 2.0 * (two[name] - w[name])
        np.testing.assert_allclose(ab[name], wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ba[name], ab[name], rtol=0, atol=2e-6)


def test_a_base_that_is_one_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    single = tiny.write_base(tmp_path / "single") / "model.safetensors"
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(adapter), "--base", str(single), "-o", str(out)]) == 0
    wanted = tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    assert all(np.allclose(a, wanted[n], atol=1e-5) for n, a in load_file(out).items())
    assert main(["merge", str(adapter), "--base", str(single), "-o", str(out)]) == 2, "it exists now"
    assert main(["merge", str(adapter), "--base", str(single), "-o", str(single), "--force"]) == 2
    assert main(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "x.safetensors")]) == 2
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_base_defaults_to_what_the_adapter_names(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out")]) == 0
    nameless = tiny.write_adapter(tmp_path / "nameless", base_model_name_or_path=None)
    assert main(["merge", str(nameless), "-o", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize("lacking", ["copy_file_range", "posix_fallocate", "preadv", "pwrite", "posix_fadvise", "all"])
def test_systems_that_lack_a_call_write_the_same(
    lacking: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dt.merge(adapter, base, tmp_path / "full")
    calls = ["copy_file_range", "posix_fallocate", "preadv", "pwrite", "posix_fadvise"]
    for call in calls if lacking == "all" else [lacking]:
        monkeypatch.delattr(os, call)
    dt.merge(adapter, base, tmp_path / "less")
    assert bytes_of(tmp_path / "full") == bytes_of(tmp_path / "less")


def test_copying_to_another_file_system(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dt.merge(adapter, base, tmp_path / "full")

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    dt.merge(adapter, base, tmp_path / "less")
    assert bytes_of(tmp_path / "full") == bytes_of(tmp_path / "less")


def test_lazy_mapping(base: Path, adapter: Path) -> None:
    lazy = dt.merged(adapter, base)
    wanted = tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    assert set(lazy) == set(wanted)
    assert len(lazy) == len(wanted)
    for name, tensor in lazy.items():
        assert tuple(tensor.shape) == wanted[name].shape
        np.testing.assert_allclose(tensor[...].numpy(), wanted[name], rtol=0, atol=1e-5)
    assert "absent" not in lazy


def test_inspect_table_and_json(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    said = capsys.readouterr().out
    for words in ("DoRA", "org/tiny", "q_proj", "12 × 8", "3 = 6/2", "F32"):
        assert words in said
    assert main(["inspect", str(adapter), "--json", "--stats", "--base", str(base)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "dora-tools/inspect/1"
    arrays = tiny.adapter_arrays()
    for module in report["modules"]:
        a, b = (arrays[f"base_model.model.{module['module']}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        assert module["change"] == pytest.approx(3 * np.linalg.norm(b @ a), rel=1e-6)
        assert module["base_tensor"] == module["module"] + ".weight"
        assert module["scaling"] == 3
        assert module["rank"] == 2


def test_inspect_plot(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert COMMANDS[command].rstrip(".").lower().split()[0] in capsys.readouterr().out.lower()


def test_formats_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    assert "peft" in capsys.readouterr().out


def test_as_a_program(adapter: Path, base: Path, tmp_path: Path) -> None:
    """The installed way in: exit codes reach the shell, stdout stays empty, errors are one line on stderr."""
    run = [sys.executable, "-m", "dora_tools", "merge", str(adapter), "-o", str(tmp_path / "out"), "--base"]
    done = subprocess.run([*run, str(base)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    done = subprocess.run(
        [*run, "absent/never-there"], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
