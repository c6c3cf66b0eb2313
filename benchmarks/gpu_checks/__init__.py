"""What benchmarks/gpu_check.py runs: one module for each part, and the harness."""
