"""Declare once what a user can set: a field with its help text and bounds, from which flags, files and checks follow.

    @configuration
    class Schedule:
        warmup: NonNegativeInt = option(default=10, help="Steps with a rising learning rate.", metavar="N")

makes a frozen dataclass that refuses a bad value with one line, `settings(Schedule)["warmup"]` says what the flag
`--warmup`, its help and its key in a configuration file need, and `Schedule(warmup=-1)` raises
`UserError: warmup is -1; it must be a whole number of at least 0`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from peer_scale.errors import UserError

_CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True, extra="forbid")
_METADATA_KEY = "option"
_LONGEST_SHOWN = 100
C = TypeVar("C")


@dataclass(frozen=True)
class Option:
    """What `option` was told of a field."""

    help: str | Mapping[str, str]
    metavar: str | None
    flag: str | None
    aliases: tuple[str, ...]
    no_flag: str | None
    default_text: str | None
    ds_config: tuple[str, ...]


def option(
    *,
    help: str | Mapping[str, str] = "",
    metavar: str | None = None,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    no_flag: str | None = None,
    default_text: str | None = None,
    ds_config: tuple[str, ...] = (),
    default: Any = dataclasses.MISSING,
    kw_only: bool = False,
) -> Any:
    """Declare a field that users set.

    Args:
        help: a sentence for `--help`, without the default and the bounds, which are added; "" hides the flag. A mapping
            from each value to its sentence gives every value a flag of its own (`--bf16`).
        metavar: what stands for the value in `--help`.
        flag: the flag's name, where it is not the field's.
        aliases: further names of the flag.
        no_flag: why there is no flag.
        default_text: what happens by default, where the default's value does not say it.
        ds_config: dotted keys of the ds_config that say the same.
        default: as for `dataclasses.field`.
        kw_only: as for `dataclasses.field`.
    """
    told = Option(help, metavar, flag, aliases, no_flag, default_text, ds_config)
    return dataclasses.field(default=default, kw_only=kw_only, metadata={_METADATA_KEY: told})


@dataclass_transform(frozen_default=True, field_specifiers=(option, dataclasses.field))
def configuration(cls: type[C]) -> type[C]:
    """Make a frozen dataclass whose values are converted to the fields' types and checked against their bounds.

    All numbers must be finite. `__post_init__` is for relations between fields; what it raises comes out as it is.
    Building one raises UserError with one line for the first bad value.
    """
    made = pydantic_dataclass(frozen=True, config=_CONFIG)(cls)
    build = made.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            raise _explained(made, error, args, kwargs) from None

    made.__init__ = __init__  # type: ignore[method-assign, assignment]
    return made  # type: ignore[return-value]


def _explained(cls: type, error: ValidationError, args: tuple, kwargs: Mapping[str, Any]) -> Exception:
    first = error.errors()[0]
    if not first["loc"]:  # of __post_init__
        return UserError(first["msg"].removeprefix("Value error, "))
    positional = [field.name for field in dataclasses.fields(cls) if not field.kw_only]
    where = first["loc"][0]
    name = positional[where] if isinstance(where, int) else str(where)
    arguments = {**dict(zip(positional, args, strict=False)), **kwargs}
    if name not in arguments or name not in settings(cls):
        return TypeError(f"{cls.__name__}: {name}: {first['msg']}")
    return settings(cls)[name].refusal(arguments[name], name)


@dataclass(frozen=True)
class Setting:
    """A field made by `option`, with all that flags and configuration files have to know of it."""

    name: str
    option: Option
    default: Any
    annotation: Any

    @property
    def flag(self) -> str:
        """The flag's name, "-" between its words, without "--"."""
        return self.option.flag or self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        """Whether the field has no default of its own."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.schema.get("type") == "boolean"

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can have, where they are listed."""
        return tuple(self.schema.get("enum", ()))

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value that is not null."""
        schema = self._adapter.json_schema()
        return next((one for one in schema.get("anyOf", ()) if one != {"type": "null"}), schema)

    @property
    def requirement(self) -> str:
        """What a value must be, to go on after "it must be"."""
        return _requirement(self.schema)

    @property
    def bounds(self) -> str:
        """The bounds of the number or numbers, such as "above 0"; "" where there are none."""
        return _bounds(self.schema.get("items", self.schema)).removeprefix("of ")

    @classmethod
    def of(cls, annotation: Any) -> Setting:
        """Make one for a value of a type, which is no field."""
        return cls("", Option("", None, None, (), None, None, ()), dataclasses.MISSING, annotation)

    def checked(self, value: Any, where: str, *, typed: bool = False) -> Any:
        """Give `value` in the field's type; UserError that begins with `where` if it cannot be one.

        `typed` values come from JSON, where text is no number and no truth value: they must be of their kind already.
        """
        if isinstance(value, bool) and not self.is_switch:  # to pydantic True is 1
            raise self.refusal(value, where)
        if typed and value is not None and not _is_of_kind(value, self.schema):
            if isinstance(value, str):
                raise UserError(f"{where} is the text {json.dumps(value)}; it must be {self.requirement}")
            raise self.refusal(value, where)
        try:
            return self._adapter.validate_python(value)
        except ValidationError:
            raise self.refusal(value, where) from None

    def refusal(self, value: Any, where: str) -> UserError:
        """Say that `value`, given as `where`, is not what it must be."""
        return UserError(f"{where} is {shown(value)}; it must be {self.requirement}")

    @functools.cached_property
    def _adapter(self) -> TypeAdapter:
        return TypeAdapter(self.annotation, config=_CONFIG)


@functools.cache
def settings(cls: type) -> Mapping[str, Setting]:
    """Give all fields of a configuration that were made by `option`, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: Setting(field.name, field.metadata[_METADATA_KEY], field.default, hints[field.name])
        for field in dataclasses.fields(cls)
        if _METADATA_KEY in field.metadata
    }


_KINDS: dict[str, tuple[str, str]] = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "truth values"),
    "object": ("a mapping", "mappings"),
    "": ("a value", "values"),
}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int, float),  # 5e8 is a whole number
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def _is_of_kind(value: Any, schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    if kind not in _PYTHON_TYPES:
        return True
    if isinstance(value, bool) or not isinstance(value, _PYTHON_TYPES[kind]):
        return kind == "boolean" and isinstance(value, bool)
    return not isinstance(value, list) or all(_is_of_kind(item, schema.get("items", {})) for item in value)


def _requirement(schema: Mapping[str, Any], *, plural: bool = False) -> str:
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "array":
        number = "one or more" if schema.get("minItems") else "a list of"
        return f"{number} {_requirement(schema['items'], plural=True)}"
    if schema.get("format") == "path":
        return "paths" if plural else "a path"
    return f"{_KINDS[schema.get('type', '')][plural]} {_bounds(schema)}".strip()


def _bounds(schema: Mapping[str, Any]) -> str:
    """Say the bounds of a number; those of whole numbers as the least and greatest that are allowed."""
    is_whole = schema.get("type") == "integer"
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if is_whole and above is not None:
        low, above = above + 1, None
    if is_whole and below is not None:
        high, below = below - 1, None
    if low is not None and high is not None:
        return f"from {_number(low)} to {_number(high)}"
    named = (("of at least", low), ("above", above), ("of at most", high), ("below", below))
    return " and ".join(f"{words} {_number(bound)}" for words, bound in named if bound is not None)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def shown(value: Any) -> str:
    """Show a value in one line as users write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    text = str(value)
    plain = bool(text) and text == text.strip() and text.isprintable()
    shown_text = text if plain else repr(text)
    return shown_text if len(shown_text) <= _LONGEST_SHOWN else f"{shown_text[:_LONGEST_SHOWN]}..."


class Given(NamedTuple):
    """A value and where it was given, as messages name it: "--lr", "run.yaml: training.lr"."""

    value: Any
    source: str


def values(given: Mapping[str, Given]) -> dict[str, Any]:
    """Take the values without where they come from."""
    return {name: one.value for name, one in given.items()}
