"""What became of one check: passed, failed or not tried, and one line that says what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["passed", "failed", "not tried"]


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        group: of checks, as `--only` names it.
        name: of the check.
        state: what became of it.
        line: what was found; of a failed check also what to do.
        details: more of it for the report, in JSON's types.
    """

    group: str
    name: str
    state: State
    line: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert "\n" not in self.line, self.line


class NotTried(Exception):
    """A check cannot be tried here; the message says why."""


class Failed(Exception):
    """A check has failed; the message is one line that says what was found and what to do.

    `details` are more of it for the report, in JSON's types.
    """

    def __init__(self, line: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(line)
        self.details = details or {}


def attempt(group: str, name: str, check: Callable[[], str | tuple[str, dict[str, Any]]]) -> Outcome:
    """Run a check that gives its line, or that and details; `Failed`, or anything else that it raises, is a failure."""
    try:
        found = check()
        return Outcome(group, name, "passed", *((found,) if isinstance(found, str) else found))
    except NotTried as reason:
        return Outcome(group, name, "not tried", str(reason))
    except Failed as failure:
        return Outcome(group, name, "failed", one_line(failure), failure.details)
    except Exception as error:
        return Outcome(group, name, "failed", f"{type(error).__name__}: {one_line(error)}")


def one_line(error: object) -> str:
    """Give what an exception says without its line breaks, cut at 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def join_nodes(found: list[tuple[str, list[Outcome]]]) -> list[Outcome]:
    """Join what each node has found by the same checks into one outcome per check: the worst, with its nodes' names.

    Args:
        found: of each node its name and the outcomes, in the same order on all.
    """
    joined = []
    for of_nodes in zip(*(outcomes for _, outcomes in found), strict=True):
        worst = max(of_nodes, key=lambda outcome: ("not tried", "passed", "failed").index(outcome.state))
        names = [name for (name, _), outcome in zip(found, of_nodes, strict=True) if outcome.state == worst.state]
        if len(found) == 1:
            joined.append(worst)
            continue
        where = f"all {len(found)} nodes" if len(names) == len(found) else _some(names)
        details = {name: outcome.line for (name, _), outcome in zip(found, of_nodes, strict=True)}
        joined.append(Outcome(worst.group, worst.name, worst.state, f"{where}: {worst.line}", details))
    return joined


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
