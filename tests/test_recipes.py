"""Mixes of stored types against what llama.cpp gave the tensors of the same models (fixtures/make_recipes.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dora_tools.dtypes import DTYPES
from dora_tools.errors import TargetError, UsageError
from dora_tools.recipes import FILE_TYPES, MIXES, Model, types_of

from .conftest import FIXTURES

RECORD: dict[str, Any] = json.loads((FIXTURES / "expected" / "recipes.json").read_text())
LLAMA = Model("llama", 2, 4, 4)


@pytest.mark.parametrize("title", RECORD["models"])
def test_types_are_those_that_llama_cpp_gives(title: str) -> None:
    import make_recipes

    model, tensors_of = make_recipes.MODELS[title]
    tensors = tensors_of()
    recorded = RECORD["models"][title]
    assert set(recorded) == set(MIXES)
    for mix, text in recorded.items():
        found = types_of(mix, tensors, model)
        assert list(found) == list(tensors)
        assert found == make_recipes.unpacked(tensors, text), mix


def test_every_model_is_recorded_and_the_models_tell_the_rules_apart() -> None:
    import make_recipes

    assert set(RECORD["models"]) == set(make_recipes.MODELS)
    models = RECORD["models"]
    for one, other in (
        ("llama 70B", "llama 65B"),
        ("llama 70B", "qwen3, 80 blocks"),
        ("llama 70B", "llama 80, eight experts"),
        ("kept", "kept, llama"),
    ):
        assert models[one] != models[other], (one, other)
    used = {run.split("*")[0] for mixes in models.values() for text in mixes.values() for run in text.split()}
    assert used == {*MIXES.values()}


def test_file_types_are_those_of_the_gguf_package() -> None:
    from gguf import LlamaFileType

    for mix, number in FILE_TYPES.items():
        assert LlamaFileType(number).name in (f"MOSTLY_{mix.upper()}", f"ALL_{mix.upper()}")
        assert MIXES[mix] in DTYPES


def test_what_llama_cpp_refuses_without_an_importance_matrix_is_refused() -> None:
    assert len(RECORD["refused"]) == 9
    for mix in RECORD["refused"]:
        with pytest.raises(TargetError, match=rf"^{mix} needs an importance matrix.*llama-quantize with --imatrix"):
            types_of(mix, {}, LLAMA)


@pytest.mark.parametrize("mix", ["q4_k_x", "Q4_K_M", "q4_k", "mxfp4", ""])
def test_unknown_mixes_are_refused_with_the_known_ones(mix: str) -> None:
    with pytest.raises(UsageError, match=rf"'{mix}' is not a mix .*q4_0, .*q4_k_m, .*iq4_xs"):
        types_of(mix, {}, LLAMA)


def test_an_architecture_with_rules_of_its_own_is_refused() -> None:
    with pytest.raises(TargetError, match="glm5-next"):
        types_of("q4_k_m", {}, Model("glm5-next", 2, 4, 4))


def test_nothing_to_do() -> None:
    assert types_of("q4_k_m", {}, LLAMA) == {}
    assert types_of("f16", {"x.weight": ("Q4_K", (256,))}, LLAMA) == {"x.weight": "Q4_K"}
