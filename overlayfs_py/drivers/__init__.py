"""The faces that other container engines call."""
