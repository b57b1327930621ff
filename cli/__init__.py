"""The command line: it talks, and leaves the work to the floors below."""
