"""Settings of `pytest bench`: what pytest must not import to look for doctests."""

collect_ignore = ["gpu/torch_side.py"]  # imports torch, which the micro-benchmarks do without
