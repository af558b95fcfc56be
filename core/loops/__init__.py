"""Loops without a host: a plain training loop, and any script."""
