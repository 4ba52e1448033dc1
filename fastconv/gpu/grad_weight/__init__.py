"""The gradient with respect to the weight on the GPU: per algorithm TILES, cost, workspace, run, kernels."""
