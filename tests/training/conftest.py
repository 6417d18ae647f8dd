"""Of tests with very many alike cases the suite runs a sample (tests/core/sampled.py)."""

pytest_plugins = ["sampled"]
