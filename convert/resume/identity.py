"""What work is: everything that decides its result, as a dictionary that is kept beside the unfinished work.

Work goes on only if the identity that is kept equals that of the command which is given now. If it does not, the
command is refused, and the first difference is named.
"""

from __future__ import annotations

import json
from typing import Any

Identity = dict[str, Any]
SHOWN = 60  # characters of a value in an error


def identity_text(identity: Identity) -> str:
    """The identity as JSON, the same text for equal identities. A value that JSON does not know becomes its str."""
    return json.dumps(identity, sort_keys=True, default=str)


def read_identity(text: str) -> object:
    """The identity that a text holds; None if it is damaged."""
    try:
        identity: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return identity


def difference(there: object, here: Identity) -> str | None:
    """The first thing in which a kept identity differs from the present one, in words; None if they are equal.

    there: the kept one, as read from JSON. If it is no identity at all, "it is damaged".
    """
    if not isinstance(there, dict):
        return "it is damaged"
    now = json.loads(json.dumps(here, default=str))
    key = next((key for key in now | there if now.get(key) != there.get(key)), None)
    return None if key is None else _described(key, there.get(key), now.get(key))


def _described(key: str, kept: Any, now: Any) -> str:
    if key == "files" and isinstance(kept, dict) and isinstance(now, dict):
        file = next(name for name in sorted(kept.keys() | now.keys()) if kept.get(name) != now.get(name))
        return f"{file} has changed since"
    return f"its {key} was {str(kept)[:SHOWN]}, not {str(now)[:SHOWN]}"
