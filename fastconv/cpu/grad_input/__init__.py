"""Gradients of the input that some tiles of an algorithm compute as a whole, not phase by phase."""
