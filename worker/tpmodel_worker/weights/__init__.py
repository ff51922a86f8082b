"""Live weight updates, on the ranks' side."""
