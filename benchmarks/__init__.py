"""Measurements; `python -m benchmarks.step` times the optimizer step."""
