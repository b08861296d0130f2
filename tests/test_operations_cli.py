"""The operations on the command line: what is refused before anything is done, what is printed, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import dora_tools as dt
from dora_tools.cli import main

from . import tiny
from .test_peft_merge import weight_files

KEY = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Inputs by name, each made when it is asked for, in the current directory."""
    monkeypatch.chdir(tmp_path)
    plain = {"use_dora": False}

    def changed(change: Callable[[tiny.Arrays], None], dora: bool = False, seed: int = 1) -> tiny.Arrays:
        arrays = tiny.adapter_arrays(seed, dora)
        change(arrays)
        return arrays

    def spoilt(name: str, value: float) -> Callable[[tiny.Arrays], None]:
        return lambda arrays: arrays[KEY + name].flat.__setitem__(3, value)

    halves = {n: a[:, :4].copy() if a.ndim == 2 else a for n, a in tiny.base_arrays().items()}
    others = {"transformer.h.0.attn.c_attn.weight": np.ones((8, 24), np.float32)}
    close = {n: a * np.float32(1.0625) if "up_proj" in n else a for n, a in tiny.base_arrays().items()}
    noisy = {n: a + np.float32(0.25) * tiny.base_arrays(7)[n] if "_proj" in n else a
             for n, a in tiny.base_arrays().items()}  # fmt: skip
    makers: dict[str, Callable[[Path], Path]] = {
        "base": lambda f: tiny.write_base(f, shards=2),
        "wrong-shape": lambda f: tiny.write_base(f, halves),
        "wrong-names": lambda f: tiny.write_base(f, others),
        "tuned": lambda f: tiny.write_base(f, noisy),
        "louder": lambda f: tiny.write_base(f, close),
        "lora": lambda f: tiny.write_adapter(f, tiny.adapter_arrays(1, False), **plain),
        "lora-2": lambda f: tiny.write_adapter(f, tiny.adapter_arrays(2, False), **plain),
        "dora": lambda f: tiny.write_adapter(f),
        "nan-a": lambda f: tiny.write_adapter(f, changed(spoilt("lora_A.weight", np.nan)), **plain),
        "inf-b": lambda f: tiny.write_adapter(f, changed(spoilt("lora_B.weight", np.inf)), **plain),
        "nan-dora": lambda f: tiny.write_adapter(f, changed(spoilt("lora_A.weight", np.nan), True)),
        "nan-m": lambda f: tiny.write_adapter(f, changed(spoilt("lora_magnitude_vector", np.nan), True)),
        "gentle": lambda f: tiny.write_adapter(f, gentle()),
    }

    def make(name: str) -> Path:
        return folder if (folder := tmp_path / name).exists() else makers[name](folder)

    return make


def gentle() -> tiny.Arrays:
    """A DoRA whose magnitudes are nearly the norms, as after a training: its change is nearly of low rank."""
    arrays, base = tiny.adapter_arrays(), tiny.base_arrays()
    random = np.random.default_rng(0)
    for module in tiny.MODULES:
        key = f"base_model.model.{module}."
        v = base[f"{module}.weight"] + 3 * arrays[key + "lora_B.weight"] @ arrays[key + "lora_A.weight"]
        m = np.linalg.norm(v, axis=1) * (1 + 0.01 * random.normal(size=len(v)))
        arrays[key + "lora_magnitude_vector"] = m.astype(np.float32)
    return arrays


def command(line: str, at: Callable[[str], Path]) -> list[str]:
    """The words of a command line, inputs made on the way."""
    words = line.split()
    for i, word in enumerate(words):
        after = words[i - 1] if i else ""
        if after in ("--base", "--tuned") or (i and not word.startswith("-") and not after.startswith("--")):
            at(word)
    return words


WORK = ["rescale.svd_of_product", "combine.svd_of_product", "subspace._fit", "dora.dora_norms", "lora.dora_norms"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes time says that it was called, which the command line reports as a bug (1)."""

    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("this is work")

    for name in WORK:
        monkeypatch.setattr(f"dora_tools.operations.{name}", work)


BEFORE: list[tuple[str, int, str]] = [
    # how many
    ("to-lora dora --base base", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("to-lora dora --base base --rank 2 --energy 0.9", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("rescale lora --ratio 3 --parameters 5K", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("combine lora lora-2 --rank 2 --energy 0.9", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("extract --base base --tuned tuned", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("to-lora dora --base base --max-rank 4", 2, "one of --rank, --energy, --ratio and --parameters"),
    ("rescale lora", 2, "Say what is to change"),
    *((f"{start} {rule}", 2, word)
      for start in ("to-lora dora --base base", "rescale lora", "combine lora lora-2",
                    "extract --base base --tuned tuned")
      for rule, word in (("--rank 0", "at least 1"), ("--rank -1", "at least 1"), ("--energy 0", "at most 1"),
                         ("--energy 1.5", "at most 1"), ("--energy nan", "at most 1"), ("--ratio 0.5", "at least 1"),
                         ("--ratio nan", "at least 1"), ("--parameters 0", "at least 1"),
                         ("--energy 0.5 --max-rank 0", "at least 1"))),
    ("rescale lora --parameters many", 2, "no number of parameters"),
    ("rescale lora --parameters -5", 2, "no number of parameters"),
    ("rescale lora --rank 9", 4, "8 at most"),
    ("combine lora lora-2 --rank 9", 4, "8 at most"),
    ("combine lora dora --base base --rank 9", 4, "8 at most"),
    ("rescale lora --parameters 35", 4, "rank 1 everywhere takes 36"),
    ("combine lora lora-2 --parameters 35", 4, "rank 1 everywhere takes 36"),
    # options that contradict each other
    ("rescale lora --rank 1 --refit", 2, "--base"),
    ("rescale lora --rank 1 --weighted", 2, "--base"),
    ("rescale lora --set-alpha 0", 2, "would erase"),
    ("rescale lora --set-alpha nan", 2, "would erase"),
    ("rescale lora --set-alpha inf", 2, "would erase"),
    ("rescale lora --dtype int8", 2, "not a type"),
    ("combine lora lora-2 --weight 1 --weight 1 --weight 1", 2, "2 adapters, but 3 weights"),
    ("combine lora lora-2 lora --weight 1 --weight 2", 2, "3 adapters, but 2 weights"),
    ("combine lora lora-2 --weight nan", 2, "finite"),
    ("combine lora lora-2 --density 0.5", 2, "for pruning"),
    ("combine lora lora-2 --method ties", 2, "rank or energy"),
    ("combine lora lora-2 --method ties --parameters 500", 2, "not a budget"),
    ("combine lora lora-2 --method ties --rank 2 --density 0", 2, "density"),
    ("combine lora lora-2 --method ties --rank 2 --density 1.01", 2, "density"),
    ("combine lora lora-2 --method ties --rank 2 --density nan", 2, "density"),
    ("combine lora lora-2 --method best", 2, "best"),
    ("combine lora dora", 2, "--base and a rank"),
    ("combine lora dora --base base", 2, "--base and a rank"),
    ("combine lora dora --rank 2", 2, "--base and a rank"),
    ("combine", 2, "ADAPTER"),
    ("to-dora lora --base base --axis both", 2, "both"),
    ("to-dora lora --base base --device tpu", 2, "no device"),
    # inputs that do not fit
    ("to-dora dora --base base", 3, "DoRA already"),
    ("to-lora lora --base base --rank 2", 3, "plain LoRA already"),
    ("to-dora lora --base wrong-shape", 4, "8 outputs and 8 inputs"),
    ("to-dora lora --base wrong-names", 4, "no place in the base"),
    ("to-lora dora --base wrong-shape --rank 2", 4, "8 outputs and 8 inputs"),
    ("combine lora dora --base wrong-shape --rank 2", 4, "8 outputs and 8 inputs"),
    ("rescale lora --rank 1 --base wrong-names --weighted", 4, "no place in the base"),
    ("extract --base base --tuned base --rank 2", 4, "do not differ"),
    ("extract --base base --tuned wrong-names --rank 2", 4, "same architecture"),
    ("extract --base base --tuned wrong-shape --rank 2", 4, "has shape"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        *BEFORE,
        ("to-lora dora --base base --rank 9", 4, "8 at most"),
        ("to-lora dora --base base --parameters 35", 4, "36"),
        ("rescale lora --rank 1 --base wrong-shape", 4, "8 outputs"),
        ("rescale lora --dtype float64", 2, "F64"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_refused_before_any_work(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], line: str, code: int, word: str
) -> None:
    assert main([*command(line, at), "-o", "out"]) == code
    said = capsys.readouterr()
    assert word in said.err
    assert said.out == ""
    assert not Path("out").exists()


def lost(line: str) -> Any:
    return line, "NaN or Inf"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("to-dora nan-a --base base", "lora_A.weight holds 1 values that are NaN or Inf"),
        ("to-dora inf-b --base base", "lora_B.weight holds 1 values that are NaN or Inf"),
        ("to-lora nan-dora --base base --rank 2 --force", "NaN or Inf"),
        ("to-lora nan-m --base base --rank 2 --force", "lora_magnitude_vector holds 1 values that are NaN or Inf"),
        ("combine lora nan-m --base base --rank 2 --force", "NaN or Inf"),
        ("combine nan-a lora --method ties --rank 2", "NaN or Inf"),
        ("rescale nan-m --rank 1 --base base", "NaN or Inf"),
        ("rescale nan-a --rank 1", "lora_A.weight holds 1 values that are NaN or Inf"),
        ("rescale inf-b --rank 3", "lora_B.weight holds 1 values that are NaN or Inf"),
        ("rescale nan-a --energy 0.9", "NaN or Inf"),
        ("rescale nan-a --parameters 50", "NaN or Inf"),
        ("rescale nan-a --dtype float16", "NaN or Inf"),
        lost("rescale nan-a --set-alpha 3"),
        lost("rescale inf-b --rslora"),
        lost("combine nan-a lora-2"),
        lost("combine nan-a"),
        lost("combine nan-a lora-2 --rank 2"),
    ],
)
def test_nan_is_refused_and_named(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], line: str, word: str
) -> None:
    assert main([*command(line, at), "-o", "out"]) == 3
    assert word in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_impossible_rank_is_refused_before_the_models_are_compared(
    at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **options: Any) -> None:
        raise AssertionError("this is work")

    monkeypatch.setattr("dora_tools.operations.extract.distances", work)
    assert main([*command("extract --base base --tuned tuned --rank 99", at), "-o", "out"]) == 4


@pytest.mark.parametrize("line", ["to-dora lora --base base", "rescale lora --rank 1", "combine lora lora-2"])
def test_what_is_there_is_not_written_over(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    Path("out").mkdir()
    (Path("out") / "precious.txt").write_text("mine")
    words = command(line, at)
    assert main([*words, "-o", "out"]) == 2
    assert [path.name for path in Path("out").iterdir()] == ["precious.txt"]
    assert main([*words, "-o", "out", "--force"]) == 0
    before = weight_files(at("lora"))
    assert main([*words, "-o", "lora", "--force"]) == 2, "never over an input"
    assert weight_files(at("lora")) == before
    assert "input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code"),
    [("to-lora gentle --base base --rank 4 -o lora", 2), ("to-lora gentle --base base --rank 4 -o out --to no", 2)],
)  # fmt: skip
@pytest.mark.usefixtures("no_work")
def test_an_impossible_output_is_refused_before_any_work(at: Callable[[str], Path], line: str, code: int) -> None:
    at("lora")
    words = line.split(" -o ")
    assert main([*command(words[0], at), "-o", *words[1].split()]) == code


REPORT = {"schema", "operation", "modules", "total", "notes", "out", "format"}
MODULE = {"module", "shape", "rank_before", "rank", "delta", "error", "weight", "dropped", "kept_energy"}
TOTAL = {"delta", "error", "kept_energy", "relative_error_of_delta", "relative_error_of_weight",
         "relative_error_without_magnitude"}  # fmt: skip
COMMANDS = {
    "to-dora lora --base base": False,
    "to-lora dora --base base --rank 2": True,
    "rescale lora --rank 1": True,
    "rescale lora --set-alpha 3": False,
    "rescale dora --rank 1 --base base --weighted --refit": True,
    "combine lora lora-2": False,
    "combine lora lora-2 --rank 2": True,
    "combine lora dora --base base --rank 2": True,
    "combine lora lora-2 --method dare_ties --energy 0.9": True,
    "extract --base base --tuned tuned --rank 2": True,
    "extract --base base --tuned tuned --rank 2 --dora": True,
}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_report_is_json_of_one_schema(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert main([*command(line, at), "-o", "out", "--json", "--force"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report.keys() == REPORT
    assert report["schema"] == "dora-tools/operation/1"
    assert (report["operation"], report["out"], report["format"]) == (line.split()[0], "out", "peft")
    assert {m["module"] for m in report["modules"]} == set(tiny.MODULES)
    for module in report["modules"]:
        assert module.keys() == MODULE
        assert tuple(module["shape"]) == tiny.MODULES[module["module"]]
        rank = load_file("out/adapter_model.safetensors")[f"base_model.model.{module['module']}.lora_A.weight"].shape[0]
        assert module["rank"] == rank
    if not COMMANDS[line]:
        assert report["total"] is None
        return
    total = report["total"]
    assert total.keys() == TOTAL
    for key in ("delta", "error"):
        assert total[key] == pytest.approx(sum(m[key] ** 2 for m in report["modules"]) ** 0.5)
    assert total["relative_error_of_delta"] == pytest.approx(total["error"] / total["delta"])
    assert total["kept_energy"] == pytest.approx(max(0, 1 - (total["error"] / total["delta"]) ** 2))
    assert ("without" in str(report) and total["relative_error_without_magnitude"] is not None) == (
        line.startswith("to-lora")
    )


@pytest.mark.parametrize("line", COMMANDS)
def test_without_json_a_table_says_how_good_it_is_on_stderr(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert main([*command(line, at), "-o", "out", "--force"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "q_proj" in said.err
    assert "12 × 8" in said.err
    assert ("%" in said.err) == COMMANDS[line]
    assert said.err.endswith("Wrote peft to out.\n")


def test_the_papers_start_warns(at: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command("to-dora lora --base base --init paper", at), "-o", "out", "--json"]) == 0
    said = capsys.readouterr()
    assert "note: m = ‖W‖, not ‖W + s·BA‖" in said.err
    assert any("another than the LoRA's" in note for note in json.loads(said.out)["notes"])
    arrays, base = load_file("out/adapter_model.safetensors"), tiny.base_arrays()
    for module in tiny.MODULES:
        norms = np.linalg.norm(base[f"{module}.weight"].astype(np.float64), axis=1)
        np.testing.assert_allclose(arrays[f"base_model.model.{module}.lora_magnitude_vector"], norms, rtol=1e-6)


def test_a_lossy_lora_must_be_meant(at: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command("to-lora dora --base base --rank 2", at), "-o", "out"]
    assert main(words) == 5
    said = capsys.readouterr().err
    for way in ("% of the energy", "leaving the magnitudes out", "higher rank", "--force", "merge the adapter", ".diff",
                "scale for each output"):  # fmt: skip
        assert way in said
    assert not Path("out").exists()
    assert main([*words, "--force"]) == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["use_dora"] is False

    assert main([*command("to-lora gentle --base base --rank 3", at), "-o", "gentle-lora"]) == 0
    assert main([*command("combine lora dora --base base --rank 1", at), "-o", "sum"]) == 5
    assert not Path("sum").exists()


def test_the_base_that_the_adapter_names_is_the_default(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, arrays = at("base"), tiny.adapter_arrays(1, False)
    tiny.write_adapter(Path("named"), arrays, use_dora=False, base_model_name_or_path=str(base))
    assert main(["to-dora", "named", "-o", "dora"]) == 0
    assert main(["to-lora", "dora", "--rank", "2", "-o", "again"]) == 0
    was, now = (dt.merged(Path(name), base)["model.layers.1.mlp.up_proj.weight"][...] for name in ("named", "again"))
    np.testing.assert_allclose(now, was, atol=1e-5)
    assert main(["to-dora", str(at("lora")), "-o", "out"]) == 6
    assert "--base" in capsys.readouterr().err


def test_other_formats_are_written_too(at: Callable[[str], Path]) -> None:
    """One magnitude for each input, which PEFT refuses and rasbt's layers have."""
    words = command("to-dora lora --base base --axis in", at)
    assert main([*words, "-o", "out"]) == 5
    assert not Path("out").exists()
    assert main([*words, "-o", "out", "--to", "rasbt-dora"]) == 0
    given = dt.Given(scaling=1.0)
    was, now = dt.merged(at("lora"), at("base")), dt.merged(dt.read_adapter(Path("out"), given=given), at("base"))
    for module in tiny.MODULES:
        np.testing.assert_allclose(now[f"{module}.weight"][...], was[f"{module}.weight"][...], atol=1e-5)


def test_seeds_and_threads(at: Callable[[str], Path]) -> None:
    """The same bytes for any number of threads, and for the same seed."""
    words = command("combine lora lora-2 --method dare_linear --density 0.5 --rank 8", at)
    made = {}
    for name, options in {"a": "--threads 1", "b": "--threads 3", "c": "--seed 0", "d": "--seed 1"}.items():
        assert main([*words, "-o", name, *options.split()]) == 0
        made[name] = weight_files(Path(name))
    assert made["a"] == made["b"] == made["c"]
    assert made["d"] != made["a"]
    assert main([*words, "-o", "e", "--threads", "0"]) == 2


def test_numbers_of_parameters_may_have_units(at: Callable[[str], Path]) -> None:
    at("lora"), at("lora-2")
    sizes = {}
    for text in ("72", "0.072K", "0.05k", "1M"):
        assert main(["combine", "lora", "lora-2", "--parameters", text, "-o", text]) == 0
        sizes[text] = sum(a.size for a in load_file(Path(text) / "adapter_model.safetensors").values())
    assert sizes == {"72": 72, "0.072K": 72, "0.05k": 36, "1M": 4 * 36}


def test_alpha_rank_and_type_at_once(at: Callable[[str], Path]) -> None:
    words = command("rescale lora --rank 4 --set-alpha 5 --rslora --dtype bfloat16", at)
    assert main([*words, "-o", "out"]) == 0
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 5, True)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert {u.delta.lora_A.dtype for u in dt.read_adapter(Path("out")).updates} == {"BF16"}  # type: ignore[attr-defined]
    base = at("base")
    was, now = dt.merged(at("lora"), base), dt.merged(Path("out"), base)
    for module in tiny.MODULES:
        a, b = was[f"{module}.weight"][...], now[f"{module}.weight"][...]
        assert float((a - b).norm() / a.norm()) < 0.005


def test_the_rest_is_saved_only_if_asked_for(at: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arrays = tiny.read_model(at("louder"))
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 2
    tiny.write_base(Path("both"), arrays)
    words = ["extract", "--base", str(at("base")), "--tuned", "both", "--rank", "8", "-o", "out"]
    assert main(words) == 4
    said = capsys.readouterr().err
    assert "model.norm.weight" in said
    assert "--save-rest" in said
    assert main([*words, "--save-rest"]) == 0
    assert main(["merge", "out", "--base", "base", "-o", "merged"]) == 0
    for name, array in tiny.read_model(Path("merged")).items():
        np.testing.assert_allclose(array, arrays[name], atol=1e-5)
