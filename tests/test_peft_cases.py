"""LoRA, DoRA and their variants as PEFT saves them: merged, written back, or refused; see ``peft_cases``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from dora_tools import api

from .peft_cases import OLD_LAYERS, RELOADED, Case, cases, network, of_peft, outputs, table

LORA = [case for case in cases("LORA", "TRAINABLE_TOKENS") if not case.refused]
REFUSED = [case for case in cases("LORA", "XLORA", "POLY", "PROMPT_TUNING", "PREFIX_TUNING") if case.refused]
CLOSE = 1e-5


def ids(case: Case) -> str:
    return case.name


def merge(case: Case, out: Path) -> Any:
    api.merge(case.path, case.base, out, given=case.given)
    if case.is_network:
        shutil.copy(case.base / "network.json", out)
    return outputs(network(out), case.inputs)


@pytest.mark.parametrize("case", LORA, ids=ids)
def test_merged_as_trained(case: Case, tmp_path: Path) -> None:
    found = merge(case, tmp_path / "out")
    if case.name == "pissa-bf16":
        return
    expected = case.expected
    if case.facts.get("lost"):
        notes = api.plan_merge(case.path, case.base, tmp_path / "again").notes
        assert any("did not save the biases" in note for note in notes)
    if case.name in RELOADED:
        expected = outputs(of_peft(case.path, case), case.inputs)
        assert np.abs(expected - case.expected).max() > 0.1  # or there is nothing to warn of
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < CLOSE
    assert case.facts["differs_from_base"] > 100 * CLOSE


@pytest.mark.parametrize("case", [case for case in LORA if case.name not in OLD_LAYERS], ids=ids)
def test_written_back(case: Case, tmp_path: Path) -> None:
    """What is written loads into PEFT without a missing or an unexpected key, and computes the same."""
    api.convert(case.path, tmp_path / "again", "peft", given=case.given, base=case.base)
    if case.name == "pissa-bf16":
        return same_files(case, tmp_path / "again")
    found = outputs(of_peft(tmp_path / "again", case), case.inputs)
    expected = case.expected if case.name not in RELOADED else merge(case, tmp_path / "out")
    assert np.abs(found - expected).max() < CLOSE


@pytest.mark.parametrize("name", OLD_LAYERS)
def test_written_back_for_the_transformers_that_trained_it(name: str, tmp_path: Path) -> None:
    case = Case(name)
    assert "peft_reload" in case.facts
    api.convert(case.path, tmp_path / "again", "peft", given=case.given, base=case.base)
    same_files(case, tmp_path / "again")


def same_files(case: Case, again: Path) -> None:
    """The same tensors under the same names, and a config that says the same."""
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (case.path, again))
    assert old.keys() == new.keys()
    assert all((old[key] == new[key]).all() and old[key].dtype == new[key].dtype for key in old)
    written = json.loads((again / "adapter_config.json").read_text())
    assert {**case.config, "inference_mode": True} == written


def test_the_table_of_the_readme_says_what_ran() -> None:
    """To mend it: python -m tests.test_peft_cases."""
    assert README.read_text() == renewed()


README = Path(__file__).parent.parent / "README.md"


def renewed() -> str:
    before, _, rest = README.read_text().partition("<!-- peft table -->\n")
    _, end, after = rest.partition("<!-- end of peft table -->")
    return f"{before}<!-- peft table -->\n{table()}\n{end}{after}"


if __name__ == "__main__":
    README.write_text(renewed())
