"""A guest that attacks: what our kernel module does to the device, row by row, and what must come of it."""
