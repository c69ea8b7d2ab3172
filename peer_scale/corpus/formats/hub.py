"""Data sets of the Hugging Face hub, streamed through the `datasets` library."""

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from peer_scale.corpus.formats.base import SAMPLED_BYTES, Source, usable_documents
from peer_scale.errors import UserError

# owner/name or name, optionally followed by :configuration
_HUB_ID = re.compile(r"^\w[\w.-]*(?:/[\w.-]+)?(?::[\w.-]+)?$")


@dataclass(frozen=True)
class HubDataset(Source):
    """The `train` split of a data set, named as `owner/name` or `owner/name:configuration`."""

    @classmethod
    def takes(cls, name: str) -> bool:
        return _HUB_ID.match(name) is not None

    def identity(self, sampled_bytes: int = SAMPLED_BYTES) -> list[str]:
        return [f"hub {self.name}"]

    def documents(self, text_key: str) -> Iterator[str]:
        from huggingface_hub import HfApi

        name, _, configuration = self.name.partition(":")
        try:
            # Asked first because load_dataset tries half a minute for a name that nothing answers to.
            revision = HfApi().dataset_info(name).sha
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.name}: neither an existing path nor a data set that can be loaded ({reason})"
            ) from error
        yield from load_hub_documents(name, configuration or None, revision, text_key)


def load_hub_documents(name: str, configuration: str | None, revision: str | None, text_key: str) -> Iterator[str]:
    """Stream the text of a data set's `train` split.

    Raises:
        UserError: it cannot be loaded or read, has no such column, or a value of it is not a string.
    """
    yield from usable_documents(_column(_rows(name, configuration, revision), name, text_key))


def _rows(name: str, configuration: str | None, revision: str | None) -> Iterator[dict]:
    import datasets

    number = 0
    try:
        for row in datasets.load_dataset(name, configuration, split="train", revision=revision, streaming=True):
            yield row
            number += 1
    except Exception as error:  # whatever the reader of the data set's files raises
        reason = " ".join(str(error).split())
        doing = f"read on after row {number}" if number else "loaded"
        file = _file_being_read(error)
        raise UserError(
            f"{name}{f', {file}' if file else ''}: the data set's train split cannot be {doing} ({reason})"
        ) from error


def _file_being_read(error: Exception) -> str | None:
    """Find the name of the file, which `datasets` does not put into the error, but which its readers hold."""
    files = [
        frame.f_locals.get("file")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules.")
    ]
    return next((file for file in files if isinstance(file, str)), None)


def _column(rows: Iterator[dict], name: str, text_key: str) -> Iterator[str | None]:
    for row in rows:
        if text_key not in row:
            raise UserError(f"{name}: no column {text_key!r}; its columns are {', '.join(row)} (--text-key names one)")
        text = row[text_key]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}: column {text_key!r} holds {type(text).__name__}, not strings")
        yield text
