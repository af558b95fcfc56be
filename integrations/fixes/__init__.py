"""The remedies in each host's words, by rule code: one file a host."""
