"""Places in source code, and text that is safe to print."""
