"""Benchmarks: programs, never tests. `make bench`, `make bench-history` and
`make bench-loader` run them; the last line is one JSON object."""
