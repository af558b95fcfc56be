"""What adapters read from their host's objects: the precision that was asked for, and the batch that failed."""
