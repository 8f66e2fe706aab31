"""Benchmarks: programs, never tests. `make bench` runs them; the last line is one JSON object."""
