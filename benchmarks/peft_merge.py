"""What users run today: ``python -m benchmarks.peft_merge BASE ADAPTER OUT``, PEFT's load, merge and save."""

from __future__ import annotations

import sys


def main(base: str, adapter: str, out: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
