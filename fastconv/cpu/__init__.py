"""The CPU backend: one file per algorithm, all of them around the vector microkernel of `simd`."""
