"""Atomic file writes: a crash, a full disk or Ctrl-C leaves the old files intact."""

import os
import tempfile
from pathlib import Path


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``: writes a file beside it, flushes it to disk, then renames it."""
    atomic_write_all({path: content})


def atomic_write_all(files: dict[Path, bytes]) -> None:
    """Replaces several files that belong together: none is renamed before all of them are on disk."""
    written: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            written[path] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            written[path].chmod(0o644)
        for path, temporary_path in written.items():
            temporary_path.replace(path)
        for folder in {path.parent for path in files}:
            sync_folder(folder)
    except BaseException:
        for temporary_path in written.values():
            temporary_path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that renames survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
