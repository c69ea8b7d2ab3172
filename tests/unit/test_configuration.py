"""Fields declared once: conversion, bounds, and what is said of a bad value."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option, settings
from peer_scale.errors import UserError


@configuration
class Sample:
    needed: PositiveInt = option(help="Needed.")
    share: Annotated[float, Field(gt=0, le=1)] = option(default=0.5, flag="the-share")
    span: Annotated[int, Field(ge=2, lt=9)] = option(default=4)
    many: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = option(default=(1.0,))
    maybe: NonNegativeInt | None = option(default=None)
    kind: Literal["a", "b"] = option(default="a")
    switch: bool = option(default=False)
    path: Path | None = option(default=None)
    text: str = option(default="x")

    def __post_init__(self) -> None:
        if self.maybe == self.needed:
            raise UserError("maybe and needed must differ")


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("needed", 0, "needed is 0; it must be a whole number of at least 1"),
        ("needed", 2.5, "needed is 2.5; it must be a whole number of at least 1"),
        ("share", 0, "share is 0; it must be a number above 0 and of at most 1"),
        ("share", float("nan"), "share is nan; it must be a number above 0 and of at most 1"),
        ("span", 9, "span is 9; it must be a whole number from 2 to 8"),
        ("many", (1.0, 0.0), "many is [1.0, 0.0]; it must be one or more numbers above 0"),
        ("many", (float("inf"),), "many is [inf]; it must be one or more numbers above 0"),
        ("many", (), "many is []; it must be one or more numbers above 0"),
        ("maybe", -1, "maybe is -1; it must be a whole number of at least 0"),
        ("kind", "c", "kind is c; it must be one of a, b"),
        ("switch", "perhaps", "switch is perhaps; it must be true or false"),
        ("path", 3, "path is 3; it must be a path"),
        ("text", None, "text is null; it must be text"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(name, bad, said):
    with pytest.raises(UserError) as error:
        Sample(**{"needed": 1, name: bad})
    assert str(error.value) == said
    with pytest.raises(UserError) as error:
        dataclasses.replace(Sample(needed=1), **{name: bad})
    assert str(error.value) == said
    with pytest.raises(UserError) as error:
        settings(Sample)[name].checked(bad, "--the-flag")
    assert str(error.value) == said.replace(name, "--the-flag", 1)


def test_values_come_out_in_the_fields_types():
    """As YAML and command lines give them: 1e-3 is text to YAML, lists are no tuples."""
    sample = Sample(needed="3", share="1e-3", many=[1, "2"], maybe=None, path="a/b", switch="true")
    assert sample == Sample(needed=3, share=0.001, many=(1.0, 2.0), path=Path("a/b"), switch=True)
    assert isinstance(sample.many, tuple)
    assert [type(item) for item in sample.many] == [float, float]


def test_true_is_no_number():
    for name in ("needed", "share", "maybe", "kind"):
        with pytest.raises(UserError, match="is true"):
            settings(Sample)[name].checked(True, name)


def test_relations_are_checked_after_the_bounds():
    with pytest.raises(UserError) as error:
        Sample(needed=2, maybe=2)
    assert str(error.value) == "maybe and needed must differ"
    with pytest.raises(UserError, match="needed is 0"):
        Sample(needed=0, maybe=0)


def test_a_wrong_call_is_no_users_fault():
    for arguments in ({}, {"needed": 1, "neded": 2}):
        with pytest.raises(TypeError):
            Sample(**arguments)


def test_it_is_a_frozen_dataclass():
    sample = Sample(5, 0.25)
    assert dataclasses.asdict(sample)["share"] == 0.25
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.share = 0.5
    with pytest.raises(UserError, match="share is 2"):
        Sample(5, 2)


def test_settings_say_what_flags_need():
    found = settings(Sample)
    assert list(found) == [field.name for field in dataclasses.fields(Sample)]
    assert [found[name].flag for name in ("needed", "share")] == ["needed", "the-share"]
    assert found["needed"].is_required and not found["share"].is_required
    assert [name for name in found if found[name].is_switch] == ["switch"]
    assert found["kind"].choices == ("a", "b")
    assert [found[name].bounds for name in ("needed", "many", "text")] == ["at least 1", "above 0", ""]
