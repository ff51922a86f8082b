"""The Kubernetes operator. Not built yet: this package only holds its place in the wheel."""
