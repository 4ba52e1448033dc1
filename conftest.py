"""What pytest collects: the examples of fastconv.torch only where torch is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["fastconv/torch"]
