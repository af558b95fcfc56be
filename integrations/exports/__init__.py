"""Compares what a host's own export wrote with the model that it exported."""
