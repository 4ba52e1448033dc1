"""The run on a GPU: `python -m bench gpu`. It needs CuPy, NumPy and pytest, and torch to compare with.

Nothing here imports CuPy or torch before a function needs it: the modules are tested where neither is.
"""
