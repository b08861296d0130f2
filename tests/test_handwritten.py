"""Checkpoints of hand-written layers and of Lightning: the dense merge is what the trained network computed.

The checkpoints are real (fixtures/make_handwritten.py, make_lightning.py); the oracle is the trained model's own
forward pass, recorded there, and the plain network of ``networks.py`` that loads our output.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_tools as dt
from dora_tools.cli import main
from dora_tools.errors import DoraToolsError

FIXTURES = Path(__file__).parent.parent / "fixtures"
RULES = {"alpha": "alpha", "alpha_over_r": "alpha/rank", "one": "one"}


def entries() -> dict[str, dict[str, Any]]:
    tables = [json.loads((FIXTURES / d / "index.json").read_text())["entries"] for d in ("handwritten", "lightning")]
    return {entry["checkpoint"]: entry for table in tables for entry in table}


ENTRIES = entries()
EXACT = 1e-6  # float64 passes, of our float32 weights and of the trained network: 5.7e-7 at most was seen
CLOSE = 3e-6  # float32 passes: the exact merge, rounded once, is off by up to 2.4e-6, the order of sums alone by 1.7e-6
ON_EVAL = [name for name, e in ENTRIES.items() if e["format"] == "loralib" and e["contents"] == "full"]
GOOD = [name for name, e in ENTRIES.items() if not e["refuse"] or name in ON_EVAL]
REFUSED = [name for name, e in ENTRIES.items() if e["refuse"] and name not in ON_EVAL]


def given(entry: dict[str, Any]) -> dt.Given:
    needs = entry["needs"]
    rule = RULES[needs["rule"]] if "rule" in needs else None
    square = "square" in entry["name"] and entry["contents"] == "adapter" and entry["format"] == "rasbt-dora"
    flags = {module: tuple(on) for module, on in needs.get("enable_lora", {}).items()}
    axis: Any = "in" if square else None
    return dt.Given(alpha=needs.get("alpha"), scale_rule=rule, magnitude_axis=axis, enable_lora=flags)


def outputs(entry: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Relative distance of the merged network, and of the base, from the trained one; in float64 too, and asserted."""
    recorded = np.load(FIXTURES / entry["expected"])
    network = networks.build(entry["network"])
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    inputs = torch.from_numpy(recorded["inputs"])
    scale = np.abs(recorded["output"]).max()
    with torch.no_grad():
        ours = networks.output(network, inputs).numpy()
        wide = inputs.double() if inputs.is_floating_point() else inputs
        exact = networks.output(network.double(), wide).numpy()
    assert np.abs(exact - recorded["exact"]).max() / scale < EXACT
    return (
        float(np.abs(ours - recorded["output"]).max() / scale),
        float(np.abs(recorded["base_output"] - recorded["output"]).max() / scale),
    )


def single_file_base(entry: dict[str, Any], tmp_path: Path) -> Path:
    """The fixture's base as a directory of its own."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((FIXTURES / entry["base"]).read_bytes())
    return folder


@pytest.mark.parametrize("name", GOOD)
def test_merged_into_its_base(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    dt.merge(FIXTURES / name, single_file_base(entry, tmp_path), tmp_path / "out", given=given(entry))
    error, control = outputs(entry, tmp_path / "out")
    assert error < CLOSE
    assert control > 0.01


@pytest.mark.parametrize(
    "name",
    [n for n in GOOD if ENTRIES[n]["contents"] == "full" and "peft" not in n and n not in ON_EVAL],
)
def test_a_mixed_checkpoint_is_its_own_base(name: str, tmp_path: Path) -> None:
    dt.merge(FIXTURES / name, None, tmp_path / "out", given=given(ENTRIES[name]))
    error, _ = outputs(ENTRIES[name], tmp_path / "out")
    assert error < CLOSE


@pytest.mark.parametrize("name", ON_EVAL)
def test_layers_that_merge_on_eval_are_not_merged_twice(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    mode: Any = "eval" if "eval" in name else "train"
    with pytest.raises(DoraToolsError, match="--saved-in eval"):
        dt.merge(FIXTURES / name, None, tmp_path / "out", given=given(entry))
    assert not (tmp_path / "out").exists()
    dt.merge(FIXTURES / name, None, tmp_path / "out", given=replace(given(entry), saved_in=mode))
    assert outputs(entry, tmp_path / "out")[0] < CLOSE


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    with pytest.raises(DoraToolsError):
        dt.merge(FIXTURES / name, single_file_base(entry, tmp_path), tmp_path / "out", given=given(entry))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [n for n in GOOD if ENTRIES[n]["needs"] and "square/adapter" not in n])
def test_a_missing_scale_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FIXTURES / name)]) == 3
    said = capsys.readouterr().err
    assert "--scaling" in said or "--scale-rule" in said
    if "alpha" not in ENTRIES[name]["needs"]:
        assert "alpha is 8" in said, "found in the hyper-parameters, and said"


@pytest.mark.parametrize("name", [n for n in GOOD if ENTRIES[n]["axis"] != "in"])
def test_converted_to_peft_it_merges_to_the_same(name: str, tmp_path: Path) -> None:
    entry, base = ENTRIES[name], single_file_base(ENTRIES[name], tmp_path)
    if entry["scaled_bias"] or "nvlabs" in name:
        with pytest.raises(DoraToolsError):
            dt.convert(FIXTURES / name, tmp_path / "peft", "peft", given=given(entry), base=base)
        return
    dt.convert(FIXTURES / name, tmp_path / "peft", "peft", given=given(entry), base=base)
    dt.merge(tmp_path / "peft", base, tmp_path / "out")
    assert outputs(entry, tmp_path / "out")[0] < CLOSE


@pytest.mark.parametrize("name", [n for n in GOOD if "loralib" in n])
def test_what_only_the_base_tells_is_not_guessed(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    if entry["contents"] != "full":
        with pytest.raises(DoraToolsError, match="--base"):
            dt.convert(FIXTURES / name, tmp_path / "peft", "peft", given=given(entry))
    if "enable_lora" in entry["needs"]:
        with pytest.raises(DoraToolsError, match="--enable-lora"):
            dt.merge(FIXTURES / name, single_file_base(entry, tmp_path), tmp_path / "out", given=dt.Given(alpha=8))


@pytest.mark.parametrize("name", [n for n in GOOD if n.endswith("rasbt-dora-square/adapter.pt")])
def test_square_layers_alone_are_not_guessed(name: str, tmp_path: Path) -> None:
    """Without the base it is asked for; the base's column norms tell."""
    entry, alpha = ENTRIES[name], dt.Given(alpha=8, scale_rule="alpha")
    with pytest.raises(DoraToolsError, match="--magnitude-axis in"):
        dt.read_adapter(FIXTURES / name, given=alpha)
    dt.merge(FIXTURES / name, single_file_base(entry, tmp_path), tmp_path / "out", given=alpha)
    assert outputs(entry, tmp_path / "out")[0] < CLOSE
    other = {k: torch.ones_like(v) for k, v in load_file(FIXTURES / entry["base"]).items()}
    save_file(other, tmp_path / "base" / "model.safetensors")
    with pytest.raises(DoraToolsError, match="--magnitude-axis in"):
        dt.merge(FIXTURES / name, tmp_path / "base", tmp_path / "out2", given=alpha)


# which magnitudes a format can hold: one per output, one per input, none
HOLDS: dict[str, set[str | None]] = {
    "peft": {"out", None},
    "nvlabs": {"out"},
    "rasbt-dora": {"in"},
    "catid": {"in"},
    "rasbt-lora": {None},
    "fsdp-lora": {None},
    "minlora": {None},
    "loralib": {None},
}
# kinds of layers besides linear ones
KINDS = {"peft": {"embedding", "conv"}, "minlora": {"embedding", "conv"}, "loralib": {"embedding"}}
TARGETS = [*HOLDS, "fsdp-qdora"]
SOURCES = [n for n in GOOD if ENTRIES[n]["contents"] == "adapter" and "nvlabs" not in n and "square" not in n]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_format_into_every_other(name: str, to: str, tmp_path: Path) -> None:
    """Converted and merged is merged; or the format is refused because it cannot hold the adapter."""
    entry = ENTRIES[name]
    base = single_file_base(entry, tmp_path)
    can = to == "fsdp-qdora" if entry["scaled_bias"] else entry["axis"] in HOLDS.get(to, set())
    zoo = {"embedding", "conv"} if entry["network"]["kind"] == "zoo" else set()
    if not can or not zoo <= KINDS.get(to, set()):
        with pytest.raises(DoraToolsError):
            dt.convert(FIXTURES / name, tmp_path / "converted", to, given=given(entry), base=base)
        assert not (tmp_path / "converted").exists()
        return
    notes = dt.convert(FIXTURES / name, tmp_path / "converted", to, given=given(entry), base=base)
    again = dt.Given(scaling=1.0) if any("scaling of 1" in note for note in notes) else dt.Given()
    if to == "loralib" and "gpt2" not in name:
        again = replace(again, fan_in_fan_out=False)
    dt.merge(tmp_path / "converted", base, tmp_path / "out", given=again)
    error, _ = outputs(entry, tmp_path / "out")
    assert error < CLOSE


@pytest.mark.parametrize("own_base", [True, False])
def test_a_sharded_lightning_checkpoint(own_base: bool, tmp_path: Path) -> None:
    """The layout of Lightning's sharded checkpoints: torch's distributed format, with meta.pt beside it."""
    from torch.distributed.checkpoint import state_dict_saver as dcp

    entry = ENTRIES["lightning/rasbt-dora/model.ckpt"]
    saved = torch.load(FIXTURES / entry["checkpoint"], weights_only=True)
    dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=tmp_path / "run.ckpt", no_dist=True)
    torch.save(saved, tmp_path / "run.ckpt" / "meta.pt")
    base = None if own_base else single_file_base(entry, tmp_path)
    dt.merge(tmp_path / "run.ckpt", base, tmp_path / "out", given=given(entry))
    assert outputs(entry, tmp_path / "out")[0] < CLOSE


def test_hyper_parameters_give_the_number_and_never_the_rule() -> None:
    with pytest.raises(DoraToolsError, match=r"alpha gives 8, alpha/rank gives 2"):
        dt.read_adapter(FIXTURES / "lightning/rasbt-dora-objects/model.ckpt")
    adapter = dt.read_adapter(FIXTURES / "lightning/rasbt-dora-objects/model.ckpt", given=dt.Given(scale_rule="alpha"))
    assert {u.delta.source for u in adapter.updates} == {"alpha, hyper_parameters.alpha"}  # type: ignore[attr-defined]


def test_a_second_network_is_left_out_and_said(tmp_path: Path) -> None:
    plan = dt.plan_merge(
        FIXTURES / "lightning/rasbt-dora-company/model.ckpt", None, tmp_path / "out", given=dt.Given(scale_rule="alpha")
    )
    said = " ".join(plan.notes)
    for name in ("loss.weight", "teacher.layers.0.weight", "ema_model.module.layers.0.lora.A"):
        assert f"left out {name}" in said


def two_networks(tmp_path: Path) -> dict[str, Any]:
    """A GAN-like module: two networks of one architecture, both with rasbt's LoRA."""
    random = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    for network in ("generator", "critic"):
        for layer, (out, in_) in {"layers.0": (5, 4), "layers.2": (3, 5)}.items():
            shapes = {"linear.weight": (out, in_), "lora.A": (in_, 2), "lora.B": (2, out)}
            state |= {f"{network}.{layer}.{n}": torch.randn(shape, generator=random) for n, shape in shapes.items()}
    state["temperature"] = torch.ones(1)
    saved = {"state_dict": state, "hyper_parameters": {"alpha": 4}, "pytorch-lightning_version": "2.6.1"}
    torch.save(saved, tmp_path / "run.ckpt")
    (tmp_path / "base").mkdir()
    base = {f"layers.{i}.weight": state[f"generator.layers.{i}.linear.weight"] for i in (0, 2)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    return state


def test_of_two_networks_the_prefix_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = two_networks(tmp_path)
    merge = ["merge", str(tmp_path / "run.ckpt"), "--scale-rule", "alpha/rank", "-o", str(tmp_path / "out")]
    with_base = [*merge, "--base", str(tmp_path / "base")]
    assert main(with_base) == 4
    assert "--prefix critic." in capsys.readouterr().err
    assert main([*with_base, "--prefix", "discriminator"]) == 2
    for arguments in ([*with_base, "--prefix", "generator"], [*merge, "--prefix", "generator."]):
        assert main([*arguments, "--force"]) == 0
        assert "left out critic.layers.0" in capsys.readouterr().err
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert merged.keys() == {"layers.0.weight", "layers.2.weight"}
        part = {n: state[f"generator.layers.0.{n}"].double() for n in ("linear.weight", "lora.A", "lora.B")}
        expected = part["linear.weight"] + 2 * (part["lora.A"] @ part["lora.B"]).T
        np.testing.assert_allclose(merged["layers.0.weight"], expected, atol=1e-6)


def test_tensors_outside_the_adapted_network_are_left_out_under_any_attribute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = two_networks(tmp_path)
    one = {name: tensor for name, tensor in state.items() if name.startswith("generator") or name == "temperature"}
    torch.save({"state_dict": one, "hyper_parameters": {"lora": {"alpha": 4, "use_rslora": True}}}, tmp_path / "g.ckpt")
    merge = ["merge", str(tmp_path / "g.ckpt"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    assert main(merge) == 0, "use_rslora is a rule"
    said = capsys.readouterr().err
    assert "checkpoint's 'generator.…'" in said
    assert "left out temperature" in said
    recorded = json.loads((tmp_path / "out" / "dora_tools.json").read_text())["adapters"][0]["scaling"]
    assert recorded == [{"value": 4 / 2**0.5, "source": "4/√2, hyper_parameters.alpha", "modules": 2}]


class Factors(torch.nn.Module):
    """The article's: alpha is an attribute, and the only record of it."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__()
        self.A, self.B = (torch.nn.Parameter(torch.randn(shape)) for shape in ((in_, 2), (2, out)))
        self.alpha = 3


class WithLoRA(torch.nn.Module):
    def __init__(self, in_: int, out: int) -> None:
        super().__init__()
        self.linear, self.lora = torch.nn.Linear(in_, out), Factors(in_, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) + self.lora.alpha * (x @ self.lora.A @ self.lora.B)
        return result


def test_a_pickled_module_in_a_dictionary(tmp_path: Path) -> None:
    """As a training loop saves it: what the module remembers of alpha is found there too."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(WithLoRA(5, 7), torch.nn.ReLU(), WithLoRA(7, 3))
    torch.save({"epoch": 3, "model": net}, tmp_path / "loop.pt")
    dt.merge(tmp_path / "loop.pt", None, tmp_path / "out")
    plain = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    x = torch.randn(4, 5)
    torch.testing.assert_close(plain(x), net(x), atol=1e-5, rtol=1e-5)
