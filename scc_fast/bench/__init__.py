"""What `pytest benchmarks` and `scc-fast bench` measure with: rows, their tables and figures."""
