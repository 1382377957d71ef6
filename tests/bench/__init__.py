"""Benchmarks: each runs its peer beside us in the same run, prints a table and writes JSON to results/."""
