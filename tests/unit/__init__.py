"""One part at a time, no guest."""
