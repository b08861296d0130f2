"""What users run today: ``python -m benchmarks.peft_merge BASE ADAPTER OUT``, PEFT's load, merge and save, synced."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(base: str, adapter: str, out: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
    for path in Path(out).iterdir():  # as the others: done is what lies on the disk
        with open(path, "rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    main(*sys.argv[1:])
