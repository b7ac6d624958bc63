"""To and from the formats of other programs, and their tools. Nothing here is imported before it is asked for."""
