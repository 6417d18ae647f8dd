"""Prompts over time: the timeline's grammar, and the plan by frame."""
