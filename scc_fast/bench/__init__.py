"""Measurement for `pytest benchmarks` and `scc-fast bench`: rows, tables and figures."""
