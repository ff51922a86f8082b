"""Blocks of memory that outlive the rank that made them, since the supervisor holds their descriptors."""
