"""Checksums over a run directory, in the format of ``sha256sum``.

``SHA256SUMS`` lists every other file. It verifies only if it equals, byte for byte, what would be
written now, so a changed, missing or added file is found, and so is a changed list.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from unlearn.errors import BadInput

NAME = "SHA256SUMS"
KEY = "record.key"  # may be kept apart from a run directory that is handed on


def _sums(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() or p.is_symlink())
    return {
        path.relative_to(directory).as_posix(): _sha256(path)
        for path in files
        if path != directory / NAME
    }


def _sha256(path: Path) -> str:
    if not path.is_file():  # a link to a folder or to nothing
        return hashlib.sha256(str(path.readlink()).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def write(directory: Path) -> None:
    """Write the checksums of everything in ``directory``; a key kept apart stays listed."""
    sums = _sums(directory)
    if (directory / NAME).is_file() and KEY not in sums:
        listed = _listed((directory / NAME).read_text())
        sums |= {KEY: listed[KEY]} if KEY in listed else {}
    (directory / NAME).write_text(_text(sums))


def _listed(text: str) -> dict[str, str]:
    listed: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    return listed


def faults(directory: Path) -> list[str]:
    """What does not match, one sentence each; empty when every byte is as it was written.

    Raises:
        BadInput: not a run directory.
    """
    listed_file = directory / NAME
    if not listed_file.is_file():
        raise BadInput(f"{directory} is not a complete run directory: it has no {NAME}")
    written = listed_file.read_bytes().decode("utf-8", errors="replace")
    listed = _listed(written)
    present = _sums(directory)
    if KEY in listed and KEY not in present:
        present[KEY] = listed[KEY]
    found = [f"{name} is missing" for name in listed if name not in present]
    found += [f"{name} was added" for name in present if name not in listed]
    found += [
        f"{name} was changed"
        for name in present
        if name in listed and listed[name] != present[name]
    ]
    if not found and written != _text(present):
        found.append(f"{NAME} was changed")
    return found
