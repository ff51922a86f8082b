"""Communicators: how the ranks of one world exchange tensors."""
