"""A rollout's state on disk, and those that are kept on the way."""
