"""Comparing models honestly: the same data, the same budget, several seeds, one report."""
