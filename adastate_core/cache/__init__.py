"""What a rollout remembers: a layout that knows its bytes, a spec for each kind of storage, and the buffers of one run."""
