"""Timings of dora-tools against what a user would otherwise run: ``python -m benchmarks --help``."""
