"""Sound: what pictures are driven by, and what a video carries."""
