"""A folder that an export writes: it appears when it is whole, and only what an export made is ever removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dino_cache import InputError, read_file
from progress_utils import RefusedError, fsync_path, write_durably

NOTE = "dino_cache_export.json"  # in the folder: by it its files are known as an export's
MADE_BY = "dino_cache export"


@contextlib.contextmanager
def exported_folder(
    output: Path, layout: str, files: re.Pattern[str], about: dict[str, Any], *, force: bool
) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place once the caller has filled it. What an earlier export left
    there goes first; what a killed one left beside it goes at the start, and the work begins anew.

    Args:
        layout: its name, for the note.
        files: what files of this layout are called, relative to the folder.
        about: what else the note says.

    Raises:
        RefusedError: `output` is there without `force`, or holds something that no export of this layout made.
    """
    if os.path.lexists(output):
        _own_files(output, layout, files)
        if not force:
            raise RefusedError(f"-o {output}: exists; --force replaces an earlier export")
    temporary = output.with_name(output.name + ".partial")
    _remove(temporary, layout, files)
    temporary.mkdir()
    try:
        _write_note(temporary, layout, None, about)  # by it the files are known as an export's, also after a kill
        yield temporary
        sizes = {name: size for name, size in _files_in(temporary).items() if name != NOTE}
        for folder in sorted({(temporary / name).parent for name in sizes}):
            fsync_path(folder)
        _write_note(temporary, layout, sizes, about)
        _remove(output, layout, files)
        os.rename(temporary, output)
        fsync_path(output.parent)
    finally:
        _remove(temporary, layout, files)


def _write_note(folder: Path, layout: str, sizes: dict[str, int] | None, about: dict[str, Any]) -> None:
    note = {"made_by": MADE_BY, "layout": layout, "files": sizes, **about}
    write_durably(folder / NOTE, json.dumps(note, indent=1).encode())


def is_folder(output: Path) -> bool:
    """Whether an output is there; RefusedError where it is no folder."""
    if not os.path.lexists(output):
        return False
    if not output.is_dir() or output.is_symlink():
        raise RefusedError(f"-o {output}: is not a folder")
    return True


def _files_in(folder: Path) -> dict[str, int]:
    """Path in the folder -> size [bytes], of all that is no folder; -1 for what is no regular file either."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return found


def _own_files(folder: Path, layout: str, files: re.Pattern[str]) -> list[str]:
    """The paths in a folder of what an export left there: of a finished one those that its note lists, with their
    sizes; of a killed one those that have names of this layout.

    Raises:
        RefusedError: anything else is there.
    """
    if not is_folder(folder):
        return []
    found, note = _files_in(folder), _note_of(folder, layout)
    listed = None if note is None else note.get("files")
    for name, size in found.items():
        if name in (NOTE, f"{NOTE}.tmp") and size >= 0 and (note is not None or name != NOTE):
            continue
        is_known = note is not None and size >= 0 and files.fullmatch(name)
        if not is_known or (isinstance(listed, dict) and listed.get(name) != size):
            raise RefusedError(
                f"-o {folder}: holds {name}, which no export to {layout} made, or which was changed since; give "
                "another folder, or move it away"
            )
    return list(found)


def _note_of(folder: Path, layout: str) -> dict[str, Any] | None:
    """What an export of this layout noted of itself; None where none did."""
    try:
        note = json.loads(read_file(folder / NOTE).tobytes())
        return note if note["made_by"] == MADE_BY and note["layout"] == layout else None
    except (OSError, InputError, ValueError, RecursionError, KeyError, TypeError):
        return None


def _remove(folder: Path, layout: str, files: re.Pattern[str]) -> None:
    """Remove an export's folder, file by file: what came into it meanwhile, and is not an export's, stays."""
    names = _own_files(folder, layout, files)
    for name in sorted(names, key=NOTE.__eq__):  # the note last: by it the others are known
        os.unlink(folder / name)
    if os.path.lexists(folder):
        for parent, _, _ in os.walk(folder, topdown=False):
            os.rmdir(parent)
