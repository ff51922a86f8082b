"""The main process of a pod: starts, watches and ends the others, holds their memory. Imports no torch."""
