"""One module for each name that `python -m benches` knows: its `cases()`."""
