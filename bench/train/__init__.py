"""Networks that learn, on fastconv's own passes and NumPy alone: `python -m bench train`.

To be read in this order: data, layers, nets, optimiser, loop, recipes; then what a user sees: plot, command.
"""
