"""YAML as people mean it: a key stands once, 1e-4 is a number, and numbers are decimal."""

import re
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+")
_NOT_DECIMAL = re.compile(r"[-+]?0[0-7_]*[0-7]|.*:.*")


_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                )
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """Refuse 010, which is 8 to YAML, and 12:30, which is 750."""
        if _NOT_DECIMAL.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value} is no decimal number: put text into quotes", problem_mark=node.start_mark
            )
        is_float = node.tag.endswith(":float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)


def load(text: str) -> Any:
    """Read one YAML document; ValueError that says in one line what is wrong, and where."""
    try:
        content = yaml.load(text, _Loader)
        _count_values(content, {})
        return content
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (AttributeError, LookupError, TypeError) as error:  # by the library, of a value that is not of its own tag
        raise ValueError(f"a value is not what its tag says ({error})") from None


def _count_values(value: Any, counted: dict[int, int]) -> int:
    """Count the values in one, those behind an alias each time that it stands there; ValueError where there are many.

    Whatever walks through them all would not come to an end: nine aliases deep are billions.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = 0  # while they are being counted
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count_values(each, counted) for each in inner)
    if not counted[id(value)]:
        raise ValueError("Circular reference detected")
    if counted[id(value)] >= _MOST_VALUES:
        raise ValueError(f"its aliases stand for {_MOST_VALUES:,} values or more")
    return counted[id(value)]


def dump(content: Any) -> str:
    """Write what `load` reads as it was; keys keep their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
