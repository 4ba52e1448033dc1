"""Benchmarks of fastconv: `python -m bench --help` names the runs."""
