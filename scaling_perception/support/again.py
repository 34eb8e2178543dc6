"""The same command again: equal settings go on, other settings are refused by name, ``--overwrite`` replaces."""

import json
from collections.abc import Mapping
from typing import Any

from scaling_perception.support.configs import flatten
from scaling_perception.support.errors import UserError


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``field: old there, new here`` for each setting of two nested tables that differs; JSON's lists equal tuples."""
    old, new = (flatten(json.loads(json.dumps(side))) for side in (there, here))

    def text(side: Mapping[str, Any], name: str) -> str:
        return json.dumps(side.get(name, "absent"))[:80]

    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name}: {text(old, name)} there, {text(new, name)} here" for name in names]


def refuse_other(place: Any, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Refuse to replace the result at ``place``, made with ``there`` (None: not known), by one of ``here``.

    Raises:
        UserError: the settings differ, naming each that does.
    """
    found = ["its settings are not known"] if there is None else differing(there, here)
    if found:
        raise UserError(
            f"{place} holds another result ({'; '.join(found)}): give another name, or --overwrite to replace it"
        )
