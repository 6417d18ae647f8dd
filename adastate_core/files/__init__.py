"""Files on disk: the one function that writes them, and the readers and writers of the formats that are the pack's own."""
