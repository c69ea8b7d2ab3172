"""Command lines that say what is wrong in one line: the parser, and values in a field's type and bounds."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from peer_scale.configuration import Setting
from peer_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message} (see --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; UserError for a switch that is given a value, which argparse would take for an argument too many."""
        given = list(sys.argv[1:] if args is None else args)
        switches = {name: one for one in self._actions if one.nargs == 0 for name in one.option_strings}
        for index, word in enumerate(given):
            name, equals, value = word.partition("=")
            following = value if equals else "".join(given[index + 1 : index + 2])
            if name in switches and (equals or (following and not following.startswith("-"))):
                self.refuse_value(name, following, switches)
        return super().parse_known_args(given, namespace)

    def refuse_value(self, name: str, value: str, switches: dict[str, argparse.Action]) -> NoReturn:
        """Say what to give instead of a switch with a value."""
        opposite = name.replace("--no-", "--") if name.startswith("--no-") else name.replace("--", "--no-", 1)
        both = f"give {name} or {opposite}" if opposite in switches else f"give {name} alone"
        raise UserError(f"{name} {value}: {name} is a switch without a value: {both}")


class Checked(argparse.Action):
    """Stores a value in its setting's type, or raises UserError naming the flag, the value and what it must be."""

    def __init__(self, *args: Any, setting: Setting, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._setting = setting

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self._setting.checked(values, str(option_string)))


def of(annotation: Any) -> dict[str, Any]:
    """Give what `add_argument` needs to check a value by a type: `parser.add_argument("--n", **of(PositiveInt))`."""
    return {"action": Checked, "setting": Setting.of(annotation)}
