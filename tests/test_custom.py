"""The three tables of the README, as they stand there, on checkpoints of layers that a few lines of torch compute."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
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
        (("(?P<module>.+)\\.a", "(?P<module>.+"), "is broken"),
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
