"""The fixes in each host's words, by rule code: one file per host."""
