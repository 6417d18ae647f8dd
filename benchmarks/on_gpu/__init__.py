"""The sections of benchmarks/gpu.py: what a rollout takes on a GPU, part by part."""
