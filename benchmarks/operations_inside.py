"""Parts of ``operations`` that need torch: each a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median


def adapter(folder: Path) -> None:
    """A LoRA of Llama-2-7B's shapes, rank 64, bf16, random: 32 layers × 7 modules."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (4096, 4096)
    )
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (11008, 4096)) | {"mlp.down_proj": (4096, 11008)}
    tensors = {}
    random = torch.Generator().manual_seed(0)
    for layer in range(32):
        for name, (out, in_) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(64, in_, generator=random) * 0.02).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (torch.randn(out, 64, generator=random) * 0.02).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "use_dora": False, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def svd() -> list[str]:
    """4096², rank 64 → 16: thin QR beside the dense SVD, in float64, and how far apart the two are."""
    import torch

    from dora_tools.lowrank import factors_of, svd_of_product

    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 4096, generator=random), torch.randn(4096, 64, generator=random)
    b *= torch.logspace(0, -3, 64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a16, b16 = factors_of(*svd_of_product(a, b), 16)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    u, values, vt = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    dense = time.perf_counter() - start
    best = (u[:, :16] * values[:16]) @ vt[:16]
    apart = float((b16.double() @ a16.double() - best).norm() / best.norm())
    return [
        f"4096², r 64 → 16: {median(times):.3f} s (median of 5); dense SVD {dense:.1f} s: {dense / median(times):.0f} "
        f"times; the two differ by {apart:.1e}"
    ]


def peft(path: Path) -> list[str]:
    """Error of the merged weight after to-lora and after PEFT's own conversion of the same trained DoRA."""
    import torch
    from peft import PeftModel, convert_to_lora
    from transformers import AutoModelForCausalLM

    import dora_tools as dt
    from dora_tools.binding import bind

    sys.path.insert(0, str(path.parent))
    from real_models import smollm2

    folder = smollm2("float32")
    source = dt.read_adapter(path)
    base = dt.open_checkpoint(folder)
    names = list(bind([(source, 1.0)], base).bound)
    tuned = dt.merged(path, folder)
    plain = {name: base.read(name).double() for name in names}
    change = {name: tuned[name][...].double() - plain[name] for name in names}
    total = sum(float(d.square().sum()) for d in change.values()) ** 0.5
    lines = []
    for rank in (4, 16):
        start = time.perf_counter()
        outcome = dt.to_lora(path, folder, rank=rank, force=True)
        ours = time.perf_counter() - start
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), path)
        start = time.perf_counter()
        _, state = convert_to_lora(model, rank)
        theirs = time.perf_counter() - start
        off = 0.0
        for key in (k for k in state if ".lora_A" in k):
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            delta = state[key.replace("lora_A", "lora_B")].double() @ state[key].double()
            off += float((delta - change[name]).square().sum())
        assert outcome.total is not None
        assert outcome.total.error is not None
        lines.append(
            f"smollm2-dora as a LoRA of rank {rank}: off by {outcome.total.error / total:.1%} of the change "
            f"({ours:.1f} s); PEFT's convert_to_lora by {off**0.5 / total:.1%} ({theirs:.1f} s)"
        )
    return lines


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "adapter":
        adapter(place)
    else:
        found = svd() if what == "svd" else peft(place)
        Path(sys.argv[-1]).write_text(json.dumps(found))
