"""Values of a row by the names of columns, dotted for what lies inside."""

from typing import Any

ABSENT = object()
"""What `look_up` finds where there is no such column; None is a column without a value."""


def look_up(row: Any, name: str) -> Any:
    """The value at a dotted name, in which numbers index lists; ABSENT where there is none."""
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for key in name.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return ABSENT
    return value


def is_missing(value: Any) -> bool:
    return value is None or value is ABSENT or value != value  # NaN: how pandas writes it
