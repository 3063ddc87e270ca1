"""A Hugging Face dataset, from the hub or a folder, as a source of documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from motifarch.data.documents import Document, Skipped, document
from motifarch.errors import UserError


@dataclass(frozen=True)
class HubSource:
    """What ``datasets.load_dataset`` can load: a name on the hub, or a local folder."""

    spec: str
    path: str
    config: str | None
    split: str
    text_field: str
    streaming: bool
    known_state: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """A local folder's files' state; for the hub, the name alone."""
        return self.known_state

    def documents(self) -> Iterator[Document | Skipped]:
        """Load the dataset and read its rows in order.

        Raises:
            UserError: if it cannot be loaded or read, or has no such field.
        """
        try:
            rows = datasets.load_dataset(self.path, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # the library raises many kinds, from network errors to bad names
            raise self._cannot("load", error) from None
        if rows.column_names is not None:
            if self.text_field not in rows.column_names:
                raise UserError(
                    f"--source {self.spec} has no field {self.text_field!r}: "
                    f"pass --text-field with one of {', '.join(rows.column_names)}"
                )
            rows = rows.select_columns([self.text_field])
        iterator = enumerate(rows, start=1)
        while True:
            try:
                number, row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # streaming meets the network, and damaged files, only here
                raise self._cannot("read", error) from None
            yield document(f"{self.path}:{number}", row.get(self.text_field))

    def _cannot(self, verb: str, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return UserError(
            f"--source {self.spec}: cannot {verb} split {self.split!r} ({reason}): check the name, the config "
            "(hf:NAME:CONFIG), --hf-split and the network, or give a local folder of data files"
        )
