"""What things cost beside their peers: `python -m benches`; docs/benches.md says what each pair means."""
