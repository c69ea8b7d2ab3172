"""Encoders of two small layers as folders that transformers opens, and data that they can learn."""

import json
import random
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from peer_scale.corpus.wordpiece import train_wordpiece

GOOD = ["good", "fine", "great", "lovely", "bright", "clever", "warm"]
BAD = ["bad", "poor", "awful", "ugly", "dull", "silly", "cold"]
OTHERS = ["the", "film", "book", "play", "was", "is", "seems", "quite", "rather", "very", "a", "an", "story", "end"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def write_encoder(folder: Path, family: str = "electra", **sizes: object) -> Path:
    """Write an untrained model of a family with a WordPiece tokenizer of the words above."""
    words = " ".join([*GOOD, *BAD, *OTHERS])
    wordpiece = train_wordpiece([f"{words} {words}"], 120)
    wordpiece.save(folder)
    common = {"vocab_size": wordpiece.vocab_size, "pad_token_id": wordpiece.pad_id, **SIZES, **sizes}
    torch.manual_seed(0)
    if family == "electra":
        model = ElectraForPreTraining(ElectraConfig(**{"embedding_size": 8, "initializer_range": 0.3, **common}))
    elif family == "bert":
        model = BertForMaskedLM(BertConfig(initializer_range=0.3, **common))
    else:
        no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        model = ModernBertForMaskedLM(ModernBertConfig(initializer_range=0.3, **{**common, **no_tokens}))
    model.save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of which each says one word of praise or blame, with "good" or "bad"."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        name, words = (("good", GOOD), ("bad", BAD))[number % 2]
        text = [*rng.choices(OTHERS, k=rng.randint(2, 7)), rng.choice(words)]
        rng.shuffle(text)
        found.append((" ".join(text), name))
    rng.shuffle(found)
    return found


def write_task(folder: Path, train: int = 64, dev: int = 32, test: int = 32, name: str = "praise") -> Path:
    """Write a task's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"name": name, "kind": "classification", "metric": "accuracy", "columns": ["text"], "label": "label"}
    (folder / "task.json").write_text(json.dumps(told))
    for seed, (part, count) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        rows = [f"{text}\t{label}" for text, label in sentences(count, seed)]
        (folder / f"{part}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return folder


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)
