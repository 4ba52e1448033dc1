"""The gradient with respect to the weight on the CPU: per algorithm TILES, cost, workspace and run."""
