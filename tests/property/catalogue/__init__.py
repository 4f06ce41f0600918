"""Rows of the robustness catalogue that are a story rather than one change, and the list of all rows about rings."""
