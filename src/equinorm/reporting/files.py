"""Writing files whole or not at all: into a temporary file in the same folder, then renamed."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from equinorm._errors import EquinormError

REPORTS = (".html", ".png")
"""Suffixes of reports: a page, or a picture."""

Content = bytes | memoryview | Callable[[Path], object]
"""Of a file: its bytes, or what writes them to a path."""

Files = list[tuple[Path, Content]]
"""That are written together."""


class OutputError(EquinormError):
    """A file cannot be written as asked; nothing was written."""


def check_target(path: Path, suffixes: Sequence[str], force: bool, advice: str = "") -> None:
    """Refuse early what could not be written in the end; advice is what else to say of another suffix.

    Raises:
        OutputError: for another suffix, a missing or read-only folder, or a file that exists and `force` is off.
    """
    if path.suffix not in suffixes:
        raise OutputError(f"{path}: unknown suffix {path.suffix!r}. It must end in {' or '.join(suffixes)}.{advice}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {folder}. Create it first.")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists. Use force=True to replace it, or write to another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is read-only. Write to another one.")


def make_folder(path: Path) -> None:
    """Create a folder and those above it, unless it exists.

    Raises:
        OutputError: if that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {path}: {error.strerror}. Write to another one.") from error


def write_atomically(files: Sequence[tuple[Path, Content]], force: bool) -> None:
    """Write several files; all are complete on disk before the first takes its name.

    Args:
        files: each path, and its content; what writes it is given a temporary path.
        force: replace files that exist.

    Raises:
        OutputError: if one cannot be written; existing files are untouched and temporary ones removed then.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for path, content in files:
            target = path.resolve()
            try:
                handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
                staged.append((Path(name), target))
                os.close(handle)
                if callable(content):
                    content(Path(name))
                else:
                    Path(name).write_bytes(content)
                with open(name, "rb+") as written:  # Windows syncs only what may be written
                    os.fsync(written.fileno())
                os.chmod(name, _mode(target))
            except OSError as error:
                reason = getattr(error, "strerror", None) or str(error)
                if not target.parent.is_dir():
                    reason = f"there is no folder {target.parent}"
                raise OutputError(f"cannot write {path}: {reason}. Nothing was written.") from error
        for (temporary, target), (path, _) in zip(staged, files, strict=True):
            if target.exists() and not force:
                raise OutputError(f"{path} exists by now. Use force=True to replace it, or write to another name.")
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise OutputError(f"cannot write {path}: {error.strerror}. It is as it was.") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or those of a new one."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_report(path: str | os.PathLike[str], draw: Callable[[Path], bytes]) -> None:
    """Draw a page or a picture, as a path's suffix says, and write it.

    Raises:
        OutputError: if the path is none of these, or cannot be written.
    """
    target = Path(path)
    check_target(target, REPORTS, force=True)
    write_atomically([(target, draw(target))], force=True)
