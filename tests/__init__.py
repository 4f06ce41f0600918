"""The tests, by what they need: unit, property, stateful, cli (nothing), kernel (real Linux), peers (real others)."""
