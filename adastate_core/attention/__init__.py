"""One pass's attention over the cache, and how Wan's layers are given it."""
