"""Directories that are there as a whole or not at all, whatever breaks off their writing.

    .step_000050.tmp    a draft: its files are forced to the disk one by one, the manifest last
    step_000050         the same, renamed
    .step_000050.old    what had the name before, until the new one has it

A kill, a full disk or a power failure at any moment leaves the old directory or the new one. `tidy` removes
the rest at the next start, and gives back the name of an old one that its successor never took.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlswitch.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 2
"""Of what a checkpoint holds, in its manifest. 1 had none there, and no settings in state.json."""
DRAFT, ASIDE = ".tmp", ".old"


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A directory to write files into: `final` once the block has ended well, without a trace otherwise."""
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
        _give_name(draft, final)
    except BaseException:
        with suppress(OSError):  # then the next start does
            tidy(parent)
        raise


def tidy(parent: Path) -> None:
    """Removes what interrupted writers have left in `parent`; only while nobody writes there."""
    for aside in sorted(parent.glob(f".*{ASIDE}")):
        final = parent / aside.name.removeprefix(".").removesuffix(ASIDE)
        if final.exists():
            remove(aside)
        else:
            os.replace(aside, final)
    for draft in sorted(parent.glob(f".*{DRAFT}")):
        remove(draft)


def remove(directory: Path) -> None:
    """Of one that lies elsewhere, the link alone."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def find_fault(path: Path) -> str | None:
    """What differs from the directory as it was written, or None. Reads every byte, interprets none.

    Raises ConfigError for a format that only a later version knows.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"its manifest cannot be read ({error})"
    form, files = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("format", "files"))
    if isinstance(form, int) and form > FORMAT:
        raise ConfigError(
            f"resume = {path}: it has format {form}, this rlswitch reads up to {FORMAT}; install the one that"
            " saved it, or set resume=never or another output_dir"
        )
    if form != FORMAT or not isinstance(files, dict):
        return f"its manifest is corrupt, or of an older format (it says {form}, this reads {FORMAT})"
    if strangers := sorted(_files(path).keys() - files.keys() - {MANIFEST}):
        return f"{strangers[0]} is not in its manifest: nothing is read that was not saved with it"
    return next((fault for name, it in files.items() if (fault := _file_fault(path, name, it))), None)


def is_about_disk(error: BaseException) -> bool:
    """Whether it tells of a disk that is full, broken or gone. Libraries in Rust have only its text."""
    return isinstance(error, OSError) or "(os error " in str(error)


def _file_fault(path: Path, name: str, expected: Any) -> str | None:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
        return f"its manifest is corrupt (at {name})"
    if file.stat().st_size != expected["bytes"]:
        return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
    if _digest(file) != expected["sha256"]:
        return f"{name} is corrupt (its SHA-256 differs from the manifest's)"
    return None


def _seal(draft: Path) -> None:
    """Every file to the disk, then the manifest, then the directories that name them."""
    files = _files(draft)
    for file in files.values():
        _sync(file)
    listed = {name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for name, file in files.items()}
    manifest = draft / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))
    _sync(manifest)
    for directory in [*(path for path in sorted(draft.rglob("*")) if path.is_dir()), draft]:
        _sync(directory)


def _give_name(draft: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}{ASIDE}")
    if final.exists():
        os.replace(final, aside)
    os.replace(draft, final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _files(directory: Path) -> dict[str, Path]:
    """Everything below `directory` that is not a directory, by its path from there."""
    return {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
