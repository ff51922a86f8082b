"""Schedules continuous batches and drives the ranks. Imports no torch."""
