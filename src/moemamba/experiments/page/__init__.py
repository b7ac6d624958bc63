"""Comparisons as pages: words and drawings."""
