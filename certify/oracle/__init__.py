"""Other people's bounds behind our interface, for cross-checks."""
