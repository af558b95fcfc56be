"""How a step is seen: one context manager a file, each of which removes exactly what it added."""
