"""A finished folder goes to the Hugging Face Hub, or to a server that speaks its language."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from motifarch.errors import UserError, first_line


def check_repository_name(name: str) -> None:
    """Checks it before any work is done.

    Raises:
        UserError: it is no repository's name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name!r}: {first_line(error)}; give USER/MODEL or MODEL") from None


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads a folder in one commit, into a repository that is made if there is none.

    Args:
        folder: an exported model's.
        name: the repository's, ``user/model`` or ``model``.
        private: whether one that is made is private.

    Returns:
        The repository's address.

    Raises:
        UserError: the server refuses or can't be reached.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload a model exported by motifarch"
        )
    except Exception as error:  # the library raises many kinds: its own, the HTTP client's, the system's
        raise UserError(
            f"{folder} could not be pushed to {name}: {first_line(error)}; it is whole on the disk: check the name, "
            f"`hf auth login` and the network, then run `hf upload {name} {folder}`"
        ) from None
    return str(repository)
