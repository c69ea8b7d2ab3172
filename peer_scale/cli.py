"""The command `peer-scale NAME ...`: lists the commands, and imports the one that it runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from peer_scale import __version__
from peer_scale.errors import USER_ERROR_EXIT_CODE


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main(argv, prog)` runs it, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("peer_scale.commands.train", "pre-train a text encoder"),
    "data": Command("peer_scale.commands.data", "tokenise text into .bin/.idx files once, or verify them"),
    "plan": Command("peer_scale.commands.plan", "memory, traffic and time of a layout, before a job is queued"),
    "convert": Command(
        "peer_scale.commands.convert", "checkpoints: look into, check, reshape, to and from Hugging Face"
    ),
    "report": Command("peer_scale.commands.report", "one HTML page of runs side by side, or of an experiment"),
    "finetune": Command("peer_scale.commands.finetune", "GLUE or own data: scores over seeds, a model to use"),
    "experiment": Command("peer_scale.commands.experiment", "pre-train, fine-tune and compare arms at equal FLOPs"),
    "doctor": Command("peer_scale.commands.doctor", "what works on this machine or cluster, before the first job"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; the exit code is the command's, or 2 where there is none."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        module = importlib.import_module(COMMANDS[name].module)
        return module.main(arguments, prog=f"peer-scale {name}")
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"peer-scale {__version__}")
        return 0
    known = ", ".join(COMMANDS)
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}? Known" if nearest else "known"
    wrong = f"unknown command {name}" if name else "a command is missing"
    print(f"error: {wrong}; {hint}: {known} (see peer-scale --help)", file=sys.stderr)
    return USER_ERROR_EXIT_CODE


def help_text() -> str:
    """List the commands with what they do."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: peer-scale COMMAND ...\n\n"
        "Pre-training of text encoders with PEER, ELECTRA, TEAMS and BERT objectives, at any scale.\n\n"
        f"commands:\n{commands}\n\n"
        "peer-scale COMMAND --help shows a command's flags, with an example."
    )


if __name__ == "__main__":
    sys.exit(main())
