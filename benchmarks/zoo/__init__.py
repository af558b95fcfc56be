"""Healthy models of many families, trained under AmpCheck: none may raise an alarm, and none may train otherwise."""
