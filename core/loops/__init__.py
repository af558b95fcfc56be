"""The loops that no host runs: a plain one, and any script."""
