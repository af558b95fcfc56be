"""Healthy models of many families, trained under AmpCheck: none may get an error or train differently."""
