"""What ``pytest --shapes`` checks signatures with."""

from collections.abc import Callable
from typing import Any, Self

import beartype

CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as for types


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its arguments and result checked; configs are made of what a file holds, and check it."""
    left = function.__name__ == "__init__" or Self in function.__annotations__.values()  # which classes alone may have
    return function if left else CHECK(function)
