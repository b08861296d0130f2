"""What ``convert`` writes, in the hands of others: PEFT runs it, and the way into a format and back keeps every number.

The oracles are PEFT's own loader, the recorded outputs of the trained networks (fixtures/), and the files before the
conversion. NVlabs' fixtures are not here: some of their modules have a magnitude and no factors, which PEFT's LoRA
cannot hold (test_handwritten has the refusal).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

import dora_tools as dt
from dora_tools.errors import TargetError

from . import tiny
from .models import Tensors, stored
from .test_handwritten import CLOSE, ENTRIES, FIXTURES, GOOD, given

PREFIX = "base_model.model."
FITTING = [
    name for name in GOOD if (e := ENTRIES[name])["axis"] != "in" and not e["scaled_bias"] and e["format"] != "nvlabs"
]
LIGHTNING = [name for name in FITTING if "peft" in ENTRIES[name]["format"]]
REAL = ["minilm-dora", "smollm2-dora", "smollm2-lora", "smollm2-rslora"]


def network_of(name: str, real_model: Callable[[str], Path]) -> nn.Module:
    """The network that an adapter belongs to, as it was before the training."""
    if name in REAL:
        auto: Any = transformers.AutoModel if name.startswith("minilm") else transformers.AutoModelForCausalLM
        real: nn.Module = auto.from_pretrained(real_model(name.split("-")[0]), dtype="auto")
        return real
    network = networks.build(ENTRIES[name]["network"])
    network.load_state_dict(load_file(FIXTURES / ENTRIES[name]["base"]))
    for path, layer in list(network.named_modules()):
        if isinstance(layer, networks.Conv1D):  # the same layer in the only class that PEFT adapts
            inner, outer = layer.weight.shape
            network.set_submodule(path, transformers.pytorch_utils.Conv1D(outer, inner))
            network.get_submodule(path).load_state_dict(layer.state_dict())
    return network


def to_peft(name: str, out: Path) -> None:
    """A fixture converted, with all that its index says a user must give."""
    entry = ENTRIES[name]
    dt.convert(FIXTURES / name, out, "peft", given=given(entry), base=FIXTURES / entry["base"])


def in_peft(folder: Path, network: nn.Module) -> Any:
    """The network with the adapter, loaded by PEFT: it missed no key, and every value of the file is in the model.

    from_pretrained says nothing of keys that it does not expect: one that names a parameter of the base is copied into
    it, any other is dropped.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(network, folder)
    assert not [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    file, owned = stored(folder), get_peft_model_state_dict(model)
    held = model.state_dict() | owned
    assert owned.keys() <= file.keys() <= held.keys()
    assert [key for key, value in file.items() if not torch.equal(held[key].double(), value.double())] == []
    return model


def scalings(model: Any) -> dict[str, float]:
    """What PEFT multiplies, by the plain name of each module that it adapted."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix(PREFIX): module.scaling["default"] for name, module in adapted.items()}


def whole(folder: Path) -> Tensors:
    """The tensors of a PEFT file that are no factors, under plain names."""
    found = {key: value for key, value in stored(folder).items() if "lora_" not in key}
    return {key.removeprefix(PREFIX).replace(".base_layer.", "."): value for key, value in found.items()}


def assert_same_file(one: Path, other: Path) -> None:
    """The same config, keys, types and bits."""
    a, b = stored(one), stored(other)
    assert {key: (t.dtype, t.shape) for key, t in a.items()} == {key: (t.dtype, t.shape) for key, t in b.items()}
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    texts = [(folder / "adapter_config.json").read_text() for folder in (one, other)]
    assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("name", FITTING)
def test_peft_computes_what_the_trained_network_did(
    name: str, tmp_path: Path, real_model: Callable[[str], Path]
) -> None:
    entry = ENTRIES[name]
    to_peft(name, tmp_path / "peft")
    model = in_peft(tmp_path / "peft", network_of(name, real_model))
    scaling = entry["scaling"]
    assert scalings(model) == {m: scaling[m] if isinstance(scaling, dict) else scaling for m in entry["modules"]}
    recorded = np.load(FIXTURES / entry["expected"])
    with torch.no_grad():
        computed = networks.output(model, torch.from_numpy(recorded["inputs"])).numpy()
    scale = np.abs(recorded["output"]).max()
    assert np.abs(computed - recorded["output"]).max() / scale < CLOSE
    assert np.abs(recorded["base_output"] - recorded["output"]).max() / scale > 0.01


@pytest.mark.parametrize("name", FITTING)
def test_what_was_trained_whole_is_in_the_file(name: str, tmp_path: Path) -> None:
    """A mixed checkpoint brings its frozen tensors along, since nothing in it says that they are; they are the base's.

    That PEFT takes them all is what in_peft checks.
    """
    entry = ENTRIES[name]
    to_peft(name, tmp_path / "peft")
    found, base = whole(tmp_path / "peft"), load_file(FIXTURES / entry["base"])
    assert {key for key, value in found.items() if not torch.equal(value, base[key])} == set(entry["replaced"])
    if entry["contents"] == "adapter":
        assert found.keys() == set(entry["replaced"])


def test_what_peft_takes_into_the_base_it_does_not_save_again(
    tmp_path: Path, real_model: Callable[[str], Path]
) -> None:
    """PEFT's limit, and what a user must know: embeddings and norms that were trained in place arrive, once."""
    name = "handwritten/rasbt-lora-gpt/adapter.pt"
    to_peft(name, tmp_path / "peft")
    in_peft(tmp_path / "peft", network_of(name, real_model)).save_pretrained(tmp_path / "again")
    lost = stored(tmp_path / "peft").keys() - stored(tmp_path / "again").keys()
    assert lost == {PREFIX + key for key in ENTRIES[name]["replaced"]}


@pytest.mark.parametrize("name", [n for n in LIGHTNING if ENTRIES[n]["replaced"]])
def test_a_saved_module_stays_one(name: str, tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    """Its key says modules_to_save: a copy beside the base, which a tied partner must not follow."""
    to_peft(name, tmp_path / "peft")
    model = in_peft(tmp_path / "peft", network_of(name, real_model))
    assert {PREFIX + key for key in ENTRIES[name]["replaced"]} <= get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("name", FITTING)
def test_the_config_has_options_of_peft_only(name: str, tmp_path: Path) -> None:
    """Older versions of PEFT refuse a config with any other, and what a run was called is nobody else's business."""
    to_peft(name, tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written.keys() <= LoraConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", REAL)
def test_peft_to_peft_changes_nothing(name: str, tmp_path: Path, real_model: Callable[[str], Path]) -> None:
    dt.convert(FIXTURES / name, tmp_path / "peft", "peft")
    assert_same_file(FIXTURES / name, tmp_path / "peft")
    before, after = (scalings(in_peft(f, network_of(name, real_model))) for f in (FIXTURES / name, tmp_path / "peft"))
    assert before == after
    assert len(before) == sum(".lora_A." in key for key in stored(tmp_path / "peft"))


@pytest.mark.parametrize("name", LIGHTNING)
def test_peft_inside_lightning_comes_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Under the keys of PEFT's own files; and once more into PEFT changes nothing."""
    replaced = ENTRIES[name]["replaced"]
    to_peft(name, tmp_path / "peft")
    checkpoint, found = dt.open_checkpoint(FIXTURES / name), stored(tmp_path / "peft")
    trained = {}
    for key in checkpoint.tensors:
        if key.startswith("state_dict.model.") and ".default." in key:
            plain = key.removeprefix("state_dict.model.").replace(".modules_to_save", "").replace(".default", "")
            trained[plain.replace("magnitude_vector.weight", "magnitude_vector")] = checkpoint.read(key)
    assert [key for key, value in trained.items() if not torch.equal(found[key].flatten(), value.flatten())] == []
    assert trained.keys() == {key for key in found if "lora_" in key or key.removeprefix(PREFIX) in replaced}
    dt.convert(tmp_path / "peft", tmp_path / "again", "peft")
    assert_same_file(tmp_path / "peft", tmp_path / "again")


ROUND_TRIPS = [
    (name, to)
    for name in [*REAL, *(n for n in LIGHTNING if ENTRIES[n]["contents"] == "adapter")]
    for to in (["nvlabs"] if "dora" in name else ["rasbt-lora", "fsdp-lora", "minlora"])
]


@pytest.mark.parametrize(("name", "to"), ROUND_TRIPS)
def test_there_and_back_every_number_is_the_same(
    name: str, to: str, tmp_path: Path, real_model: Callable[[str], Path]
) -> None:
    """A, the magnitude and what was trained whole bit for bit; s·B as it is folded into lora_B, rounded to float32."""
    first, there, back = FIXTURES / name, tmp_path / "there", tmp_path / "back"
    if name in LIGHTNING:
        first = tmp_path / "peft"
        to_peft(name, first)
    base = real_model(name.split("-")[0]) if name in REAL else FIXTURES / ENTRIES[name]["base"]
    notes = dt.convert(first, there, to, base=base)
    unsaid = any("a scaling of 1" in note for note in notes)
    dt.convert(there, back, "peft", given=dt.Given(scaling=1.0) if unsaid else None, base=base)
    old, new = stored(first), stored(back)
    assert old.keys() == new.keys()
    assert [key for key in old if "lora_B" not in key and not torch.equal(old[key], new[key])] == []
    assert any("magnitude" in key for key in old) == ("dora" in name)
    s, t = (scalings(in_peft(folder, network_of(name, real_model))) for folder in (first, back))
    assert s.keys() == t.keys()
    for module in s:
        a, b = (f"{PREFIX}{module}.lora_{part}.weight" for part in "AB")
        wanted, found = s[module] * old[b].double() @ old[a].double(), t[module] * new[b].double() @ new[a].double()
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), module


@pytest.mark.parametrize("to", ["rasbt-lora", "fsdp-lora", "minlora", "nvlabs"])
def test_a_saved_embedding_does_not_change_the_head_that_was_tied_to_it(to: str, tmp_path: Path) -> None:
    """PEFT trains modules_to_save as copies. A format that cannot say so must refuse, or what is merged is another."""
    weights, dora = tiny.base_arrays(), to == "nvlabs"
    del weights["lm_head.weight"]
    base = tiny.write_base(tmp_path / "base", weights, tie_word_embeddings=True)
    saved = {"base_model.model.model.embed_tokens.weight": np.full((16, 8), 2, np.float32)}
    adapter = tiny.write_adapter(
        tmp_path / "adapter", tiny.adapter_arrays(dora=dora) | saved, use_dora=dora, modules_to_save=["embed_tokens"]
    )
    dt.merge(adapter, base, tmp_path / "direct")
    assert tiny.read_model(tmp_path / "direct").keys() - weights.keys() == {"lm_head.weight"}
    try:
        dt.convert(adapter, tmp_path / "there", to)
    except TargetError:
        return
    dt.merge(tmp_path / "there", base, tmp_path / "out", given=dt.Given(scaling=1.0))
    assert tiny.read_model(tmp_path / "out").keys() == tiny.read_model(tmp_path / "direct").keys()
