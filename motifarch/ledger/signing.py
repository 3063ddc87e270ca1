"""Signatures of ledger entries: ed25519, with keys as OpenSSH or PEM files hold them."""

import base64
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from motifarch.errors import UserError, first_line

_CONTEXT = b"motifarch ledger entry\0"
"""Goes before what is signed, so that no signature made for anything else counts."""


class Signer:
    """Signs with a private key.

    Args:
        path: an unencrypted ed25519 key, such as ``ssh-keygen -t ed25519 -N ''`` writes.

    Raises:
        UserError: no such key can be read there.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            ssh = b"OPENSSH PRIVATE KEY" in content
            load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
            key = load(content, password=None)
        except OSError as error:
            raise UserError(f"the key {path} can't be read: {error.strerror}") from None
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UserError(f"{path} is no private key that can be used ({first_line(error)}); {_HOW}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise UserError(f"{path} is a key of another kind than ed25519; {_HOW}")
        self._key = key
        self.public = public_text(key.public_key())

    def sign(self, entry: str) -> dict[str, str]:
        """The public key and the signature of an entry's hash, for JSON."""
        signature = base64.b64encode(self._key.sign(_CONTEXT + entry.encode())).decode()
        return {"key": self.public, "signature": signature}


_HOW = "make one with: ssh-keygen -t ed25519 -N '' -f KEY"


def public_text(key: Ed25519PublicKey) -> str:
    """A public key in a line, as OpenSSH has it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def is_signed(entry: str, signature: dict[str, str]) -> bool:
    """Whether a signature is of an entry's hash by the key that it names."""
    try:
        key = serialization.load_ssh_public_key(signature["key"].encode())
        if not isinstance(key, Ed25519PublicKey):
            return False
        key.verify(base64.b64decode(signature["signature"], validate=True), _CONTEXT + entry.encode())
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, KeyError, AttributeError):
        return False
    return True
