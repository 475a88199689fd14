"""Atomic file writes: a crash, a full disk or Ctrl-C leaves the old files intact."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into, which gets its name when the ``with`` block ends without an error.

    Raises OSError if writing a model into it fails, for example because the disk is full; then nothing is left.
    """
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(path)
    except (RuntimeError, SafetensorError) as error:  # includes a full disk
        raise OSError(f"saving {path} failed, nothing was written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write into; it gets its name when the ``with`` block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.chmod(0o644)
        staging.replace(path)
        sync_folder(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises OSError if the disk of ``folder`` has less than ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{what} needs {needed_bytes / 1e9:.3f} GB, but {folder} has {free / 1e9:.3f} GB free: free some, or choose"
            " an output on another disk"
        )


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that renames survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
