"""Model classes by name in transformers' own module."""

from typing import Any

import transformers


def add_to_transformers(model_class: type[Any]) -> None:
    """Make ``transformers.NAME`` a class: there `transformers serve` and TRL look up the
    architecture that a folder's config names.
    """
    # That module exists twice, for transformers imports itself anew to make docstrings; both are of
    # one class.
    if type(transformers).__module__.startswith("transformers."):
        setattr(type(transformers), model_class.__name__, model_class)
