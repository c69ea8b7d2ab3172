"""Parquet files: one row per document, one of whose columns holds the text."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peer_scale.corpus.formats.base import FAILURES, FileSlice, FileSource, Piece, named_failures, usable_documents
from peer_scale.errors import UserError

_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class ParquetFile(FileSource):
    """A parquet file, cut between row groups; a null is a row without text."""

    endings: ClassVar[tuple[str, ...]] = (".parquet",)

    def slices(self, slice_bytes: int) -> Iterator[FileSlice]:
        with self._open() as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        start = unpacked = packed = 0
        for number, group in enumerate(groups):
            unpacked += group.total_byte_size
            packed += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            if unpacked >= slice_bytes or number + 1 == len(groups):
                yield FileSlice(self, start, number + 1, packed)
                start, unpacked, packed = number + 1, 0, 0

    def pieces(self, start: int, stop: int, text_key: str) -> Iterator[Piece]:
        for document in usable_documents(self._texts(start, stop, text_key)):
            yield Piece(document, True)

    def _texts(self, start: int, stop: int, text_key: str) -> Iterator[str | None]:
        with self._open() as file:
            self._check_column(file.schema_arrow, text_key)
            for group in range(start, stop):
                with self._failures_of(group, text_key):
                    for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=[text_key]):
                        yield from batch.column(text_key).to_pylist()

    def _check_column(self, schema: Any, text_key: str) -> None:
        import pyarrow

        if text_key not in schema.names:
            columns = ", ".join(schema.names)
            raise UserError(f"{self.name}: no column {text_key!r}; it has {columns} (--text-key names one)")
        kind = schema.field(text_key).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        # A column that is null in every row may have the type null.
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
            raise UserError(f"{self.name}: column {text_key!r} holds {kind}, not strings")

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with named_failures(self.name):
                return pyarrow.parquet.ParquetFile(self.name, page_checksum_verification=True)
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.name}: not a parquet file ({' '.join(str(error).split())})") from error

    @contextlib.contextmanager
    def _failures_of(self, group: int, text_key: str) -> Iterator[None]:
        """Raise what fails while a row group is read as a UserError that names it."""
        import pyarrow

        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}, row group {group}: column {text_key!r} holds text that is not UTF-8"
            ) from error
        except (*FAILURES, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.name}, row group {group}: damaged or cut short ({reason})") from error
