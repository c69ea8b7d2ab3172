"""Preparing text: the command that tokenises it, against the tokenizer alone on the same text and threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench_processes import encode_batch
from bench_text import wikipedia_introductions, write_jsonl, write_plain
from bench_turns import Action
from peer_scale.corpus.wordpiece import train_wordpiece

_TOOL = Path(__file__).resolve().parent / "preprocess_data.py"


@dataclass(frozen=True)
class Command:
    """The command from its start to its end, which writes the same files anew in each call."""

    source: Path
    tokenizer: Path
    workers: int

    def __call__(self) -> None:
        flags = {"--input": self.source, "--tokenizer": self.tokenizer, "--output-prefix": self._prefix}
        words = [str(word) for flag in flags.items() for word in flag]
        command = [sys.executable, str(_TOOL), *words, "--workers", str(self.workers)]
        subprocess.run(command, check=True, capture_output=True)

    def prepare(self) -> None:
        for path in self._prefix.parent.glob(f"{self._prefix.name}.*"):
            path.unlink()

    def memory(self) -> None:
        """Tell nothing: it is in other processes."""

    def close(self) -> None:
        self.prepare()

    @property
    def _prefix(self) -> Path:
        return self.source.with_name("prepared")


def preparation_pair(kind: str, workers: int, vocab_size: int, copies: int, folder: Path) -> tuple[Action, Action]:
    """`tools/preprocess_data.py` on Wikipedia introductions, and `encode_batch` with as many threads.

    Args:
        kind: of the file: "text" or "jsonl".
        workers: processes of ours, threads of the peer.
        vocab_size: of the WordPiece, which is trained on the text.
        copies: how often the introductions (4.9 MB) stand in the file.
        folder: for files; what lies there of an earlier call is used again.

    Raises:
        MissingPeer: the text is not installed.
    """
    texts = wikipedia_introductions()
    write, name = {"text": (write_plain, "copies.txt"), "jsonl": (write_jsonl, "copies.jsonl")}[kind]
    source, tokenizer = write(folder / name, copies), folder / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer.write_text(train_wordpiece(texts, vocab_size).to_json(), encoding="utf-8")
    return Command(source, tokenizer, workers), encode_batch(tokenizer.read_text("utf-8"), texts * copies, workers)
