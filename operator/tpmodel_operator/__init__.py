"""The Kubernetes operator: turns TPModels into gangs of pods and keeps them so."""
