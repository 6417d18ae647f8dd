"""What differs by model family."""
