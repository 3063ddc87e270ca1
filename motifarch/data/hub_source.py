"""A Hugging Face dataset, from the hub or a folder, as a source of documents."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from motifarch.data.documents import Found, Noticed, ReadOptions, printable, record_document
from motifarch.errors import UserError


@dataclass(frozen=True)
class HubSource:
    """What ``datasets.load_dataset`` can load: a name on the hub, or a local folder."""

    spec: str
    path: str
    config: str | None
    split: str
    streaming: bool
    known_state: dict[str, Any]

    def state(self) -> dict[str, Any]:
        """A local folder's files' state; for the hub, the name alone."""
        return self.known_state

    def documents(self, options: ReadOptions) -> Iterator[Found]:
        """Load the dataset and read its rows in order.

        Raises:
            UserError: if it cannot be loaded or read, or has no such field.
        """
        try:
            rows, others = self._load()
        except Exception as error:  # the library raises many kinds, from network errors to bad names
            raise self._cannot("load", error) from None
        field = options.text_field
        if rows.column_names is not None:
            root = field if field in rows.column_names else field.partition(".")[0]
            columns = [name for name in dict.fromkeys((root, "messages")) if name in rows.column_names]
            if not columns:
                raise UserError(
                    f"--source {self.spec} has no field {field!r}: "
                    f"pass --text-field with one of {', '.join(rows.column_names)}"
                )
            rows = rows.select_columns(columns)
        name = printable(self.path)
        for split in sorted(others - set(re.findall(r"[\w.-]+", self.split))):
            yield Noticed(f"{name}, {split}", "split not asked for with --hf-split")
        iterator = enumerate(rows, start=1)
        while True:
            try:
                number, row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # streaming meets the network, and damaged files, only here
                raise self._cannot("read", error) from None
            yield record_document(f"{name}:{number}", row, options)

    def _load(self) -> tuple[Any, set[str]]:
        """The rows, and the names of all splits, as far as they are known."""
        folder = Path(self.path)
        if self.config is None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(self.path)  # by save_to_disk
            return (saved[self.split], set(saved)) if isinstance(saved, datasets.DatasetDict) else (saved, set())
        rows = datasets.load_dataset(self.path, self.config, split=self.split, streaming=self.streaming)
        return rows, set(rows.info.splits or {})

    def _cannot(self, verb: str, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return UserError(
            f"--source {self.spec}: cannot {verb} split {self.split!r} ({reason}): check the name, the config "
            "(hf:NAME:CONFIG), --hf-split and the network, or give a local folder of data files"
        )
