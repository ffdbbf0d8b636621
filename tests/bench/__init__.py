"""Benchmarks: ratios of our figures to real references, alternating in one run. `make bench ONLY="P1 P2"`."""
