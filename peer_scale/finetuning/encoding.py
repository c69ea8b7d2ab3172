"""Texts and pairs as a model's inputs, cut to a length."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peer_scale.finetuning.tasks import Examples

_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class EncodedExamples(Dataset):
    """Inputs of a model as lists of ids, each with "labels" where they are known."""

    def __init__(self, inputs: dict[str, list[list[int]]], labels: np.ndarray | None) -> None:
        self._inputs, self._labels = inputs, labels

    def __len__(self) -> int:
        return len(self._inputs["input_ids"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        example: dict[str, Any] = {name: column[number] for name, column in self._inputs.items()}
        if self._labels is not None:
            example["labels"] = self._labels[number]
        return example

    def lengths(self) -> list[int]:
        """Count the tokens of each example."""
        return [len(ids) for ids in self._inputs["input_ids"]]

    def take(self, numbers: list[int]) -> EncodedExamples:
        """Give the examples of these numbers, in this order."""
        inputs = {name: [column[number] for number in numbers] for name, column in self._inputs.items()}
        return EncodedExamples(inputs, None if self._labels is None else self._labels[numbers])

    def by_length(self) -> tuple[EncodedExamples, np.ndarray]:
        """Give the examples in the order of their lengths and without labels, and their numbers here."""
        order = np.argsort(self.lengths(), kind="stable")
        return EncodedExamples(self._inputs, None).take(order.tolist()), order


class Padded:
    """Collates examples: rows are padded to the longest of the batch."""

    def __init__(self, pad_id: int) -> None:
        self._values = {"input_ids": pad_id, "token_type_ids": 0, "attention_mask": 0}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Give tensors [B, S], and labels [B]."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {}
        for name in examples[0].keys() & self._values.keys():
            rows = np.full((len(examples), longest), self._values[name], np.int64)
            for row, example in zip(rows, examples, strict=True):
                row[: len(example[name])] = example[name]
            batch[name] = torch.from_numpy(rows)
        if "labels" in examples[0]:
            batch["labels"] = torch.from_numpy(np.stack([example["labels"] for example in examples]))
        return batch


def inputs_of(model: Any) -> list[str]:
    """Name the inputs that the model takes; token types where it tells the first text from the second by them."""
    taken = inspect.signature(model.forward).parameters
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    return [name for name in _INPUTS if name in taken and (has_types or name != "token_type_ids")]


def encode(
    examples: Examples, tokenizer: Any, wanted: list[str], max_length: int, *, pops_longer: bool = False
) -> EncodedExamples:
    """Tokenise; what is longer than `max_length` tokens, the special ones included, is cut at its ends.

    Of a pair the longer text is cut. With `pops_longer` as in google-research's code: one token at a time, and of the
    second text where both are as long; otherwise as the tokenizer does, which shares an odd number out the other way.
    """
    columns = [list(column) for column in zip(*examples.texts, strict=True)] if len(examples) else [[]]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if pops_longer and len(columns) == 2 and backend is not None:
        inputs = _encode_pairs(columns, backend, max_length, wanted)
    else:
        encoded = tokenizer(
            *columns, truncation=True, max_length=max_length, return_token_type_ids="token_type_ids" in wanted
        )
        inputs = {name: encoded[name] for name in wanted}
    return EncodedExamples(inputs, examples.labels)


def _encode_pairs(
    columns: list[list[str]], backend: Any, max_length: int, wanted: list[str]
) -> dict[str, list[list[int]]]:
    backend.no_truncation()
    backend.no_padding()
    firsts, seconds = (backend.encode_batch(column, add_special_tokens=False) for column in columns)
    room = max_length - backend.num_special_tokens_to_add(True)
    attributes = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
    inputs: dict[str, list[list[int]]] = {name: [] for name in wanted}
    for first, second in zip(firsts, seconds, strict=True):
        lengths = popped_lengths(len(first), len(second), room)
        first.truncate(lengths[0])
        second.truncate(lengths[1])
        whole = backend.post_process(first, second)
        for name in wanted:
            inputs[name].append(getattr(whole, attributes[name]))
    return inputs


def popped_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Give what stays of two lengths when the longer gives one away, of equal ones the second, until both fit."""
    excess = first + second - room
    if excess <= 0:
        return first, second
    even = min(excess, abs(first - second))
    first, second = (first - even, second) if first > second else (first, second - even)
    excess -= even
    return first - excess // 2, second - (excess + 1) // 2
