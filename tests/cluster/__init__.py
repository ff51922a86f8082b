"""A real Kubernetes cluster on this machine, for tests: see README.md beside this file."""
