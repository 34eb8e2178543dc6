"""What ``pytest --shapes`` checks signatures with."""

from collections.abc import Callable
from typing import Any

import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its arguments and result checked; configs are made of what a file holds, and check it."""
    return function if function.__name__ == "__init__" else beartype.beartype(function)
