"""Command lines, ``python -m ampcheck.integrations.<host>``, for hosts that a command starts."""
