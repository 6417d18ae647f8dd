"""Files of weights, and what their systems wish."""
