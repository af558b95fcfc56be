"""Make untrusted text safe to print."""

from __future__ import annotations


def shown(text: str) -> str:
    """Escape what would drive a terminal or change the order in which ``text`` is read.

    Names and source lines are untrusted.
    """
    return text.translate(_ESCAPED)


# The control characters except the tab, and those that direct writing (https://www.unicode.org/reports/tr9/).
_CONTROLS = (*range(9), *range(10, 32), *range(127, 160), 0x61C, *range(0x200E, 0x2010), *range(0x2028, 0x202F))
_ESCAPED = {point: ascii(chr(point))[1:-1] for point in (*_CONTROLS, *range(0x2066, 0x206A))}
