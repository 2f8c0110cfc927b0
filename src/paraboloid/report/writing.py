"""Writing a report so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def check_writable(directory: Path) -> None:
    """Raise OSError unless files can be made in `directory`; leaves nothing behind, not even missing folders."""
    with _staging(directory) as (_, created):
        pass
    _remove(created)


def write(files: Mapping[str, str], directory: Path) -> list[Path]:
    """Write name -> text into `directory` (made if missing): every file to a folder beside first, then renamed.

    Whatever interrupts it before the renames, the directory is as it was, an older report included.
    """
    with _staging(directory) as (staging, _):
        for name, text in files.items():
            with open(staging / name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(staging / name, directory / name)
    return [directory / name for name in files]


@contextmanager
def _staging(directory: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A temporary folder inside `directory`, and the folders that had to be made for it; on failure all are removed."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"the output directory {str(directory)!r} is a file; expected a directory.")
    missing = [path for path in [directory, *directory.parents] if not path.exists()]
    staging = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".report-", dir=directory))
        yield staging, missing
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        _remove(missing)
        if staging is None and isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(f"the output directory {str(directory)!r} cannot be written: {reason}.") from error
        raise
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _remove(folders: list[Path]) -> None:
    """Remove the folders, deepest first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
