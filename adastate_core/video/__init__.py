"""Video files: written while they grow, joined, read, compared."""
