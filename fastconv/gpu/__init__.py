"""The CUDA backend: per algorithm TILES, cost, workspace, prepare and run; the kernels are in kernels/."""
