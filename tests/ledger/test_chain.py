"""A ledger: what was appended is read again, and what was changed is named."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from motifarch.errors import UserError
from motifarch.ledger.chain import ENTRIES, FOLDER, Entry, Ledger, digest, make_entry
from motifarch.ledger.signing import Signer, is_signed


def link(parent: str | None, weights: str = "w") -> dict[str, object]:
    """What an export says."""
    about = {"origin": None, "environment": digest("here")}
    return {"kind": "export", "parent": parent, "weights": digest(weights), **about}


def ledger(folder: Path, steps: int = 4) -> Ledger:
    found, parent = Ledger.read(folder), None
    for step in range(0, 10 * steps, 10):
        entry = make_entry(step, digest(step) if step else None, link(parent, f"w{step}"))
        found.append(entry)
        parent = entry.hash
    return found


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    written = ledger(tmp_path)
    found = Ledger.read(tmp_path)
    assert found.entries == written.entries
    assert found.problems == []
    last = found.entries[-1]
    assert found.of_manifest(digest(30)) == last
    assert [e.step for e in found.back_from(last)] == [30, 20, 10, 0]


@pytest.mark.parametrize(
    "change",
    [{"kind": "gift"}, {"kind": None}, {"weights": 7}, {"weights": "../x"}, {"environment": "x"}, {"parent": []}],
)
def test_an_entry_that_lacks_what_its_kind_says_is_named(change: dict[str, object], tmp_path: Path) -> None:
    """Its hash may be right: whoever made the ledger wrote both."""
    found = ledger(tmp_path, 1)
    found.append(make_entry(10, None, link(found.entries[-1].hash) | change))
    again = Ledger.read(tmp_path)
    assert len(again.entries) == 1
    assert len(again.problems) == 1


def test_a_run_that_goes_back_to_an_earlier_checkpoint_branches(tmp_path: Path) -> None:
    found = ledger(tmp_path)
    fork = make_entry(30, digest("other"), link(found.entries[1].hash, "x"))
    found.append(fork)
    again = Ledger.read(tmp_path)
    assert again.problems == []
    assert [e.step for e in again.back_from(again.entries[-1])] == [30, 10, 0]


CHANGES = [
    (
        lambda lines: [lines[0], lines[1].replace(b'"step":10', b'"step":11'), *lines[2:]],
        r"line 2 \(step 11\) has changed",
    ),
    (lambda lines: [*lines[:2], *lines[3:]], r"line 3 \(step 30\) goes on from an entry that is not before it"),
    (lambda lines: lines[1:], r"line 1 \(step 10\) goes on from an entry that is not before it"),
    (lambda lines: [lines[1], lines[0], *lines[2:]], r"line 1 \(step 10\) goes on from an entry"),
    (lambda lines: [b"nonsense", *lines], "line 1 is damaged"),
    (lambda lines: [lines[0].replace(b'"format":1', b'"format":9'), *lines[1:]], "line 1 is of format 9"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_was_changed_is_named(change: object, message: str, tmp_path: Path) -> None:
    ledger(tmp_path)
    path = tmp_path / FOLDER / ENTRIES
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))  # type: ignore[operator]
    problems = Ledger.read(tmp_path).problems
    assert problems

    assert re.search(message, problems[0]), problems


def test_a_line_that_a_crash_cut_short_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    found = ledger(tmp_path)
    path = tmp_path / FOLDER / ENTRIES
    path.write_bytes(path.read_bytes() + b'{"format":1,"st')
    again = Ledger.read(tmp_path)
    assert (len(again.entries), again.problems) == (4, [])
    again.append(make_entry(40, None, link(found.entries[-1].hash)))
    last = Ledger.read(tmp_path)
    assert [e.step for e in last.entries] == [0, 10, 20, 30, 40]
    assert last.problems == []


def test_what_is_kept_beside_it_has_its_hash_for_a_name(tmp_path: Path) -> None:
    found, content = Ledger.read(tmp_path), {"learning rate": 3e-4, "한국어": [1, None]}
    name = found.keep(content)
    assert found.keep(dict(reversed(content.items()))) == name == digest(content)
    assert found.kept(name) == content
    path = tmp_path / FOLDER / f"{name}.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(ValueError, match="has changed since it was written"):
        found.kept(name)
    with pytest.raises(ValueError, match="can't be read"):
        found.kept("0" * 64)


@pytest.mark.parametrize("kind", ["openssh", "pem"])
def test_signatures_are_of_the_entry_and_the_key_that_they_name(kind: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    if kind == "openssh":
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = key.with_suffix(".pub").read_text().split()[:2]
    else:
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
        public = None
    signer, entry = Signer(key), make_entry(0, None, link(None))
    signature = signer.sign(entry.hash)
    assert public is None or signature["key"].split() == public
    assert is_signed(entry.hash, signature)
    other = make_entry(10, None, link(None))
    assert not is_signed(other.hash, signature)
    assert not is_signed(entry.hash, signature | {"signature": signature["signature"][:-4] + "AAA="})
    assert not is_signed(entry.hash, {"key": signature["key"]})
    assert not is_signed(entry.hash, signature | {"key": "ssh-ed25519 AAAA"})
    stored = json.loads(Entry(entry.step, None, entry.link, entry.hash, signature).line())
    assert is_signed(stored["sha256"], stored["signature"])


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read: No such file"):
        Signer(tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(UserError, match=r"is no private key that can be used.*ssh-keygen -t ed25519"):
        Signer(tmp_path / "text")
    subprocess.run(["openssl", "genpkey", "-algorithm", "X25519", "-out", tmp_path / "x"], check=True)
    with pytest.raises(UserError, match="of another kind than ed25519"):
        Signer(tmp_path / "x")
