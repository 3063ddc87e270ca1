"""Files by their URL: s3://bucket/name, gs://, hf://, memory:// and whatever else fsspec opens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from motifarch.errors import UserError, one_line

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z0-9]+::")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of motifarch that brings a scheme's file system."""


def is_url(path: str | PathLike[str]) -> bool:
    """Whether this is a URL that `filesystem` opens, rather than a path on disk.

    Of the text that a user gave: a `Path` made of a URL has lost one of its slashes.
    """
    return isinstance(path, str) and _URL.match(path) is not None


def filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there.

    A plain URL's server is not asked anything yet: use what it gives within `explained`.
    Credentials and the endpoint are those of the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL_S3, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN), of the providers' own files or
    of fsspec's configuration. Folders on disk (file://) are made as needed, as in a bucket.

    Args:
        url: as s3://bucket/folder/file, or chained as fsspec takes it.
        options: of the file system, as fsspec takes them.

    Raises:
        UserError: the scheme is unknown, or its package is not installed.
    """
    import fsspec

    scheme = url.split("::")[0].split("://")[0].lower()
    if scheme in ("file", "local"):
        options = {"auto_mkdir": True} | options
    try:
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        needed = f'pip install "motifarch[{_EXTRAS[scheme]}]"' if scheme in _EXTRAS else one_line(error)
        raise UserError(f"{url} can't be opened, for a package is missing: {needed}") from None
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            raise UserError(
                f"{url} can't be opened: nothing known reads {scheme}://; use s3://, gs://, hf://, file:// or another "
                "that fsspec knows"
            ) from None
        raise UserError(f"{url} can't be opened: {storage_reason(error)}") from None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what goes wrong with a file system's server within the block into a message.

    Raises:
        UserError: nothing is there, it may not be read or written, or the server can't be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{url} can't be used: {storage_reason(error)}") from None


def storage_reason(error: Exception) -> str:
    """What an error of a file system means, in a line with its fix."""
    said = one_line(error)
    if isinstance(error, FileNotFoundError):
        return f"no such bucket, folder or file ({said}); check the name"
    if type(error).__name__ == "NoCredentialsError":
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
    if isinstance(error, PermissionError):
        return f"permission denied ({said}); check the credentials and what they may do there"
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in type(error).__name__:
        return f"the server can't be reached ({said}); check the network and the endpoint (AWS_ENDPOINT_URL_S3)"
    return said
