"""Adapter → Adapter: to-dora, rescale, combine; two checkpoints → Adapter: extract, of which to-lora is one."""
