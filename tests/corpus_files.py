"""Raw text and tokenised pairs for the tests of the corpus package, and its tool run as a process."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from peer_scale.corpus.wordpiece import WordPiece

TOOL = Path(__file__).parent.parent / "tools" / "preprocess_data.py"
PAIR_ENDINGS = ("bin", "idx", "json", "tokenizer.json")


def write_raw_text(folder: Path, text: str) -> None:
    """Writes some hundred documents in all kinds of files; the last one holds nothing for a tokenizer."""
    words = text.split()
    rng = random.Random(0)
    documents = [" ".join(rng.sample(words, rng.randint(1, 400))) for _ in range(600)] + ["\u200b"]
    (folder / "a.txt").write_text("\n\n".join(documents[:300]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[300:500]))
    for number, document in enumerate(documents[500:]):
        (folder / f"c{number:03d}.txt").write_text(document)


def write_uneven_text(path: Path, text: str) -> None:
    """Write documents of one word to some hundred, as many short ones as the words of `text` allow."""
    words = text.split()
    rng = random.Random(0)
    documents = [rng.sample(words, round(150 ** rng.random())) for _ in range(400)]
    path.write_text("\n\n".join(" ".join(document) for document in documents) + "\n")


def copy_pair(prefix: str, folder: Path) -> str:
    for ending in PAIR_ENDINGS:
        shutil.copy(f"{prefix}.{ending}", folder / f"corpus.{ending}")
    return str(folder / "corpus")


def contents(prefix: str | Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in PAIR_ENDINGS]


def tokens_of(wordpiece: WordPiece) -> list[str]:
    return [wordpiece.backend.id_to_token(id_) for id_ in range(wordpiece.vocab_size)]


def run_tool(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
