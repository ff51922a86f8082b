"""Measurements: each program prints a table, with peer and project in one run."""
