"""Directories that exist completely or not at all, however their writing is interrupted.

    .step_000050.tmp    a draft: its files and the manifest, synced to disk
    step_000050         the same, renamed
    .step_000050.old    the previous holder of the name, until the new one has it

A kill, a full disk or a power failure at any moment leaves the old directory or the new one. At the next
start `tidy` removes the rest; an old directory whose successor never got its name gets it back.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from rlswitch.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the contents, stored in the manifest. Format 1 did not store it, nor any settings."""
DRAFT, ASIDE = ".tmp", ".old"


@contextmanager
def written_atomically(final: Path) -> Iterator[Path]:
    """A directory to write files into. It becomes `final` if the block succeeds and is removed otherwise."""
    parent = final.parent
    if not parent.is_dir():
        parent.mkdir(parents=True)
        _sync(parent.parent)
    try:
        tidy(parent)
        draft = parent / f".{final.name}{DRAFT}"
        draft.mkdir()
        yield draft
        _seal(draft)
        if final.exists():
            os.replace(final, parent / f".{final.name}{ASIDE}")
        os.replace(draft, final)
        _sync(parent)
        shutil.rmtree(parent / f".{final.name}{ASIDE}", ignore_errors=True)
    except BaseException:
        with suppress(OSError):  # the next start does it then
            tidy(parent)
        raise


def tidy(parent: Path) -> None:
    """Removes what interrupted writers left in `parent`; only safe while nobody writes there."""
    for aside in sorted(parent.glob(f".*{ASIDE}")):
        final = parent / aside.name.removeprefix(".").removesuffix(ASIDE)
        if final.exists():
            remove(aside)
        else:
            os.replace(aside, final)
    for draft in sorted(parent.glob(f".*{DRAFT}")):
        remove(draft)


def remove(directory: Path) -> None:
    """Removes a directory; of a symlink only the link."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def checkpoint_problems(path: Path) -> Iterator[str]:
    """How the directory differs from what was written. Reads every byte and interprets none.

    Raises ConfigError for the format of a newer rlswitch.
    """
    try:
        form, files = itemgetter("format", "files")(json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        yield f"its manifest cannot be read, or is of format 1 ({error!r})"
        return
    if isinstance(form, int) and form > FORMAT:
        raise ConfigError(
            f"resume = {path}: it has format {form}, this rlswitch reads up to {FORMAT}; install the version"
            " that saved it, or set resume=never or another output_dir"
        )
    if form != FORMAT or not isinstance(files, dict):
        yield f"its manifest is corrupt: format {form}, this rlswitch reads {FORMAT}"
        return
    for stranger in sorted(_files(path).keys() - files.keys() - {MANIFEST}):
        yield f"{stranger} is not in its manifest, so it was not saved with it"
    for name, expected in files.items():
        if not (path / name).is_file():
            yield f"{name} is missing"
        elif _size_and_digest(path / name) != expected:
            yield f"{name} is corrupt: its size or SHA-256 differs from the manifest's"


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full, broken or gone. Libraries written in Rust only say so in the text."""
    return isinstance(error, OSError) or "(os error " in str(error)


def _seal(draft: Path) -> None:
    """Writes the manifest and syncs everything to disk."""
    listed = {name: _size_and_digest(file) for name, file in _files(draft).items()}
    (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))
    for path in [*draft.rglob("*"), draft]:
        _sync(path)


def _files(directory: Path) -> dict[str, Path]:
    """Everything below `directory` that is not a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _size_and_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
