"""Streaming decoders: they carry their cache from call to call."""
