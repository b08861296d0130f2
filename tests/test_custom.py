"""The three tables of the README, as they stand there, on checkpoints of layers that a few lines of torch compute."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from dora_tools.cli import main
from dora_tools.errors import InputError
from dora_tools.formats.table.syntax import parse

README = Path(__file__).parent.parent / "README.md"
TABLES = {
    re.search(r'name = "(.+?)"', text)[1]: text  # type: ignore[index]
    for text in re.findall(r"```toml\n(.+?)```", README.read_text(), re.DOTALL)
}
IN, OUT, RANK = 7, 5, 3


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"a": (IN, RANK), "b": (RANK, OUT), "w": (OUT, IN), "x": (4, IN), "bias": (OUT,), "m": (OUT, 1)}
    found = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file({"layers.0.q.weight": found["w"], "layers.0.q.bias": found["bias"]}, tmp_path / "base/model.safetensors")
    return found


def run(tmp_path: Path, table: str, checkpoint: Path, *options: str) -> dict[str, torch.Tensor]:
    (tmp_path / "my.toml").write_text(TABLES[table])
    command = ["merge", str(checkpoint), "-o", str(tmp_path / "out"), "--custom", str(tmp_path / "my.toml"), *options]
    assert main(command) == 0
    merged: dict[str, torch.Tensor] = load_file(tmp_path / "out" / "model.safetensors")
    return merged


def test_there_are_three() -> None:
    assert set(TABLES) == {"article-dora", "down-up", "kernels"}


@pytest.mark.parametrize("own_base", [True, False])
def test_article_dora_in_a_lightning_checkpoint(parts: dict[str, torch.Tensor], tmp_path: Path, own_base: bool) -> None:
    p = parts
    state = {"dora_A": p["a"], "dora_B": p["b"], "magnitude": p["m"], "base.weight": p["w"], "base.bias": p["bias"]}
    saved = {
        "state_dict": {f"model.layers.0.q.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {"lora_alpha": 6},
        "pytorch-lightning_version": "2.0",
    }
    torch.save(saved, tmp_path / "run.ckpt")
    v = p["w"].T + p["a"] @ p["b"] * (6 / RANK)  # as the articles write it: x @ W.T + x @ A @ B
    forward = p["x"] @ (v * p["m"].flatten() / (v.norm(dim=0) + 1e-8)) + p["bias"]
    base = () if own_base else ("--base", str(tmp_path / "base"))
    merged = run(tmp_path, "article-dora", tmp_path / "run.ckpt", *base)
    ours = p["x"] @ merged["layers.0.q.weight"].T + merged["layers.0.q.bias"]
    np.testing.assert_allclose(ours, forward, atol=1e-5)


def test_down_up_with_alpha_tensors(parts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    p, key = parts, "layers.0.q."
    tensors = {"lora_down.weight": p["a"].T.contiguous(), "lora_up.weight": p["b"].T.contiguous()}
    tensors |= {"alpha": torch.tensor(2.0), "rank_mask": torch.ones(RANK)}
    save_file({key + name: tensor for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    merged = run(tmp_path, "down-up", tmp_path / "lora.safetensors", "--base", str(tmp_path / "base"))
    np.testing.assert_allclose(merged["layers.0.q.weight"], p["w"] + (p["a"] @ p["b"]).T * (2 / RANK), atol=1e-6)


def test_kernels_under_other_names(
    parts: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p = parts
    tensors = {"encoder_0/q/lora_kernel_a": p["a"], "encoder_0/q/lora_kernel_b": p["b"]}
    save_file(tensors, tmp_path / "k.safetensors")
    table = TABLES["kernels"].replace("'layers.\\1.'", "'layers.\\1.'")
    (tmp_path / "my.toml").write_text(table)
    command = ["inspect", str(tmp_path / "k.safetensors"), "--custom", str(tmp_path / "my.toml")]
    assert main(command) == 3
    assert "--alpha" in capsys.readouterr().err
    assert main([*command, "--alpha", "6"]) == 3
    assert "alpha/rank gives 2" in capsys.readouterr().err
    options = ("--base", str(tmp_path / "base"), "--alpha", "6", "--scale-rule", "alpha")
    merged = run(tmp_path, "kernels", tmp_path / "k.safetensors", *options)
    np.testing.assert_allclose(merged["layers.0.q.weight"], p["w"] + (p["a"] @ p["b"]).T * 6, atol=1e-5)
    save_file({**tensors, "stranger": p["x"]}, tmp_path / "k.safetensors")
    assert main([*command, "--alpha", "6", "--scale-rule", "alpha"]) == 3
    assert "stranger" in capsys.readouterr().err


def test_converting_into_a_table_and_back(parts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    p = parts
    tensors = {"lora_down.weight": p["a"].T.contiguous(), "lora_up.weight": p["b"].T.contiguous()}
    tensors["alpha"] = torch.tensor(2.0)
    save_file({"layers.0.q." + name: tensor for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    (tmp_path / "my.toml").write_text(TABLES["down-up"])
    table = str(tmp_path / "my.toml")
    assert (
        main(
            ["convert", str(tmp_path / "lora.safetensors"), "--from", table, "--to", "peft", "-o", str(tmp_path / "p")]
        )
        == 0
    )
    assert main(["merge", str(tmp_path / "p"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(merged["layers.0.q.weight"], p["w"] + (p["a"] @ p["b"]).T * (2 / RANK), atol=1e-6)


A_AND_B = """
[[key]]
match = '(?P<module>.+)\\.a'
role = "lora_A"
dims = ["rank", "in"]
[[key]]
match = '(?P<module>.+)\\.b'
role = "lora_B"
dims = ["out", "rank"]
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('role = "lora_A"', 'role = "factor"'), "a role of"),
        (('"rank", "in"]', '"rank", "width"]'), "dimension 'width'"),
        (("(?P<module>.+)\\.a", "(.+)\\.a"), "needs a group"),
        (("(?P<module>.+)\\.a", "(?P<module>.+"), "broken pattern"),
        (('dims = ["rank", "in"]', 'dims = ["rank", "in"]\ntypo = 1'), "has no 'typo'"),
        (('role = "lora_B"', 'role = "base"'), "lora_A and lora_B"),
    ],
)
def test_a_broken_table_says_what_is_wrong(change: tuple[str, str], words: str) -> None:
    import tomllib

    parse(tomllib.loads(A_AND_B), "my.toml")
    with pytest.raises(InputError, match=re.escape(words)):
        parse(tomllib.loads(A_AND_B.replace(*change)), "my.toml")


def test_a_starter_table_for_an_unknown_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.lora_q.A": torch.zeros(8, 2), "x.lora_q.B": torch.zeros(2, 6)}, tmp_path / "u.safetensors")
    assert main(["inspect", str(tmp_path / "u.safetensors")]) == 3
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "u.safetensors"), "--suggest-format"]) == 0
    (tmp_path / "u.toml").write_text(capsys.readouterr().out)
    command = ["inspect", str(tmp_path / "u.safetensors"), "--custom", str(tmp_path / "u.toml"), "--scaling", "1"]
    assert main(command) == 0
    assert "6 × 8" in capsys.readouterr().out


FUSED = """
[[key]]
match = '(?P<module>.+)\\.lora_A'
role = "lora_A"
dims = ["parts*rank", "in"]
[[key]]
match = '(?P<module>.+)\\.lora_B'
role = "lora_B"
dims = ["rows", "rank"]
[[key]]
match = '(?P<module>.+)\\.bias'
role = "bias"
[[fused]]
match = '(?P<at>.+)\\.qkv'
rows = ["heads * size", "groups * size", "groups * size"]
[scaling]
rule = "alpha/rank"
alpha = ["hparam:alpha"]
"""
ROWS = {"q": 8, "k": 4, "v": 4}


@pytest.fixture
def fused(tmp_path: Path) -> dict[str, np.ndarray]:
    """A fused layer whose q and v have factors, a table for it, and the base under fused and under split names."""
    random = np.random.default_rng(0)
    found = {"a": random.normal(size=(2 * RANK, IN)), "b": random.normal(size=(12, RANK)), "bias": np.ones(16)}
    found |= {"w": random.normal(size=(16, IN)), "wb": random.normal(size=16)}
    found = {name: value.astype(np.float32) for name, value in found.items()}
    state = {"h.0.qkv.lora_A": found["a"], "h.0.qkv.lora_B": found["b"], "h.0.qkv.bias": found["bias"]}
    torch.save(
        {
            "state_dict": {name: torch.from_numpy(value) for name, value in state.items()},
            "hyper_parameters": {"alpha": 6, "heads": 4, "groups": 2, "size": 2},
        },
        tmp_path / "run.ckpt",
    )
    (tmp_path / "fused").mkdir()
    save_numpy({"h.0.qkv.weight": found["w"], "h.0.qkv.bias": found["wb"]}, tmp_path / "fused/model.safetensors")
    parts = np.split(found["w"], [8, 12])
    names = {f"h.0.{n}_proj.weight": part for n, part in zip(ROWS, parts, strict=True)}
    names |= {f"h.0.{n}_proj.bias": part for n, part in zip(ROWS, np.split(found["wb"], [8, 12]), strict=True)}
    (tmp_path / "split").mkdir()
    save_numpy(names, tmp_path / "split/model.safetensors")
    return found


def split_delta(fused: dict[str, np.ndarray]) -> np.ndarray:
    """By hand: the first rows of lora_A are q's, the others v's; k has none."""
    a, b = fused["a"].astype(np.float64), fused["b"].astype(np.float64)
    q, v = b[:8] @ a[:RANK], b[8:] @ a[RANK:]
    return np.concatenate([q, np.zeros((4, IN)), v]) * (6 / RANK)


def test_a_fused_layer_with_factors_for_some_of_its_parts(fused: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(FUSED)
    command = ["merge", str(tmp_path / "run.ckpt"), "--custom", str(tmp_path / "my.toml"), "-o", str(tmp_path / "out")]
    command += ["--base", str(tmp_path / "fused")]
    assert main(command) == 3, "all three parts would need more rows of lora_B"
    assert main([*command, "--enable-lora", "qkv=true,false,true"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(merged["h.0.qkv.weight"], fused["w"] + split_delta(fused), atol=1e-5)
    np.testing.assert_array_equal(merged["h.0.qkv.bias"], fused["bias"])


def test_a_fused_layer_becomes_the_modules_of_a_base_that_has_them_apart(
    fused: dict[str, np.ndarray], tmp_path: Path
) -> None:
    into = r"""into = ['\g<at>.q_proj', '\g<at>.k_proj', '\g<at>.v_proj']"""
    table = FUSED.replace("[scaling]", f"enabled = [true, false, true]\n{into}\n[scaling]")
    (tmp_path / "my.toml").write_text(table)
    command = ["--custom", str(tmp_path / "my.toml"), "--base", str(tmp_path / "split")]
    assert main(["merge", str(tmp_path / "run.ckpt"), *command, "-o", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    whole = np.concatenate([merged[f"h.0.{name}_proj.weight"] for name in ROWS])
    np.testing.assert_allclose(whole, fused["w"] + split_delta(fused), atol=1e-5)
    np.testing.assert_array_equal(merged["h.0.k_proj.weight"], fused["w"][8:12])
    np.testing.assert_array_equal(merged["h.0.v_proj.bias"], fused["bias"][12:])
    assert main(["convert", str(tmp_path / "run.ckpt"), *command, "--to", "peft", "-o", str(tmp_path / "peft")]) == 0
    arguments = ["merge", str(tmp_path / "peft"), "--base", str(tmp_path / "split"), "-o", str(tmp_path / "out2")]
    assert main(arguments) == 0
    again = load_file(tmp_path / "out2" / "model.safetensors")
    np.testing.assert_allclose(again["h.0.q_proj.weight"], merged["h.0.q_proj.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('"heads * size", "groups", "groups"', "do not give the 12 rows"),
        ('"heads * size", "unknown", 4', "'unknown' is in no config"),
        ('"heads ** 9", 4, 4', "integers, names"),
        ('"__import__(1)", 4, 4', "integers, names"),
        ('"heads // (size - 2)", 4, 4', "divided by 0"),
    ],
)
def test_row_counts_are_sums_and_products_only(
    fused: dict[str, np.ndarray], tmp_path: Path, rows: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = FUSED.replace('"heads * size", "groups * size", "groups * size"', rows)
    (tmp_path / "my.toml").write_text(table.replace("[scaling]", "enabled = [true, false, true]\n[scaling]"))
    assert main(["inspect", str(tmp_path / "run.ckpt"), "--custom", str(tmp_path / "my.toml")]) == 3
    assert words in capsys.readouterr().err


TESTED = (
    A_AND_B.replace("[[key]]", "[scaling]\nrule = 'alpha/rank'\n[[key]]", 1)
    + """
[test]
alpha = 4
tensors = { "x.a" = [[1, 2], [0, 1]], "x.b" = [[1, 0], [0, 3]] }
base = { "x.weight" = [[1, 1], [1, 1]] }
merged = { "x.weight" = [[3, 5], [1, 7]] }
"""
)


def test_a_table_is_tested_before_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "my.toml"
    table.write_text(TESTED)
    assert main(["formats", str(table)]) == 0
    assert "gives the expected weights" in capsys.readouterr().out
    save_file({"x.a": torch.eye(2), "x.b": torch.eye(2)}, tmp_path / "ab.safetensors")
    (tmp_path / "base").mkdir()
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "base/model.safetensors")
    merge = ["merge", str(tmp_path / "ab.safetensors"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    merge += ["--custom", str(table), "--alpha", "2"]
    table.write_text(TESTED.replace("rule = 'alpha/rank'", "rule = 'alpha'"))
    for command in (["formats", str(table)], merge):
        assert main(command) == 3
        assert "has 13 where 7 is expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    table.write_text(TESTED)
    assert main(merge) == 0
    table.write_text(TESTED.replace("[[1, 2], [0, 1]]", '[["one", 2], [0, 1]]'))
    assert main(["formats", str(table)]) == 3
    table.write_text(TESTED.replace('"x.weight" = [[3', '"y.weight" = [[3'))
    assert main(["formats", str(table)]) == 3
    assert "has no y.weight" in capsys.readouterr().err
