"""What things cost, measured: `python -m benches.ways`; the bare core by `cargo bench`."""
