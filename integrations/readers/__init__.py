"""What an adapter reads from its host's objects, where that takes many lines: what was asked for, and the batch that
failed."""
