"""One file per architecture, on shared tensor-parallel layers."""
