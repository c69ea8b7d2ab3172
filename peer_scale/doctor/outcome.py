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


_ALIKE = ("versions", "NCCL")  # checks whose lines must be the same on all nodes


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
    hosts = [host for host, _ in found]
    columns = zip(*(outcomes for _, outcomes in found), strict=True)
    return [column[0] if len(found) == 1 else _join(hosts, column) for column in columns]


def _join(hosts: list[str], outcomes: tuple[Outcome, ...]) -> Outcome:
    """Join what several nodes have found by one check."""
    details = dict(zip(hosts, (outcome.line for outcome in outcomes), strict=True))
    first = outcomes[0]
    other = next((host for host, line in details.items() if line != first.line), None)
    if first.name in _ALIKE and other is not None:
        line = f"nodes differ: {hosts[0]} has {first.line}; {other} has {details[other]}"
        return Outcome(first.group, first.name, "failed", line, details)
    worst = max(outcomes, key=lambda outcome: ("not tried", "passed", "failed").index(outcome.state))
    names = [host for host, outcome in zip(hosts, outcomes, strict=True) if outcome.state == worst.state]
    where = f"all {len(hosts)} nodes" if len(names) == len(hosts) else _some(names)
    return Outcome(worst.group, worst.name, worst.state, f"{where}: {worst.line}", details)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
