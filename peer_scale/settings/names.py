"""What to say of a name that is not known."""

import difflib
from collections.abc import Iterable
from typing import Any

_FEW = 12


def hint(name: Any, known: Iterable[str]) -> str:
    """Give what goes on after "unknown key x": the name that was meant where one is near, else what there is."""
    names = list(known)
    if not names:
        return "; there are none here"
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(names)}" if len(names) <= _FEW else ""
