"""What kernels take of a GPU and what their main loops consist of: compiled and disassembled, never run."""
