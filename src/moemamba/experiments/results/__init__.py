"""The figures of a comparison, computed from its runs."""
