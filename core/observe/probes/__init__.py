"""The probes of a watched step: one context manager a file, each of which removes exactly what it added."""
