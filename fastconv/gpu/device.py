"""The GPU that computes: what cpu/device.py is to the CPU."""

from fastconv.gpu import launch
from fastconv.gpu.hardware import Device as Device


def current() -> Device:
    """Return the GPU that is current in this thread."""
    return launch.driver().device()
