"""What one accelerator does with moejax: its limits, right values, speeds, floors, kernels.

`python -m benchmarks.accelerator --output=DIR` (docs/accelerator.md).
"""
