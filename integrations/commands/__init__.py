"""Command lines, ``python -m ampcheck.integrations.<host>``, for hosts that are started by a command."""
