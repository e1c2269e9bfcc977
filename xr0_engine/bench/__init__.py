"""Measurements that anyone can repeat (docs/benchmarks.md): cases, clocks, results."""
