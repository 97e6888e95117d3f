"""Files: written whole or not at all, csv read row by row, Kaggle's mounts walked."""

import contextlib
import csv
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kit.errors import UserError, reason_of

MAX_FIELD = 64 << 20  # characters in one field of a csv
MOUNTS = ("/kaggle/input", "../input")  # where Kaggle attaches data, and a copy of it at home

# --------------------------------------------------------------------------------------------------
#  Write
# --------------------------------------------------------------------------------------------------


def writable_folder(out: str | Path) -> Path:
    """Make the folder and try to write in it. Raises UserError where that fails."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").write_bytes(b"")
        (folder / ".write_test").unlink(missing_ok=True)  # another process may have been quicker
    except OSError as error:
        raise UserError(
            f"--out {out}", f"cannot be written ({error.strerror})", "name another folder"
        ) from None
    return folder


def write_file(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a file under its final name is always whole.

    Raises UserError where the disk is full or the folder is gone or read-only.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        if callable(content):
            content(unfinished)
        else:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(
            path,
            f"cannot be written ({error.strerror or reason_of(error)})",
            "free space there or name another --out",
        ) from None
    finally:
        with contextlib.suppress(OSError):  # gone with its folder
            unfinished.unlink(missing_ok=True)


def write_zip(path: Path, contents: dict[str, bytes]) -> None:
    """Write files, {name: bytes}, as a zip, whole; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # what is in it, PNG, is compressed already
        for name in sorted(contents):
            archive.writestr(zipfile.ZipInfo(name), contents[name])
    write_file(path, buffer.getvalue())


# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


def check_file(path: str | Path) -> None:
    """Raise OSError for a folder, a device, or a pipe, which a reader might wait for forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("a folder, pipe or device, not a file")


def walk_mount(mount: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """All folders below one of `MOUNTS`, in order, with the names of their files."""
    for folder, below, names in os.walk(mount, followlinks=True):
        below.sort()
        yield Path(folder), sorted(names)


def resolve_path(root: Path, name: str) -> Path:
    """A path in a manifest, which starts from the manifest's folder and may be of any system."""
    path = root.parent / name
    return path if path.is_file() else root.parent / name.replace("\\", "/")


def list_tables(folder: Path) -> list[Path]:
    """The csv files of a folder, sorted; names that start with "." are no files."""
    tables = (path for path in folder.glob("*") if path.suffix.lower() == ".csv")
    return sorted(path for path in tables if not path.name.startswith("."))


def read_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv with their numbers, the header first. Raises UserError that names the row.

    `csv`, not pandas, which fills up a short row and so turns it into an empty mask. `errors`: of
    the decoding. Empty fields beyond the header are left out.
    """
    csv.field_size_limit(MAX_FIELD)
    line = width = 0
    try:
        check_file(path)
        with path.open("rb") as file:
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with path.open(newline="", encoding=encoding, errors=errors) as file:
            head = file.readline(MAX_FIELD)
            file.seek(0)
            separator = max(",;\t", key=head.count)
            for fields in csv.reader(file, delimiter=separator, strict=True):
                line += 1
                fields = [field.strip() for field in fields]
                while len(fields) > width and not fields[-1]:
                    fields.pop()
                width = width or len(fields)
                if any(fields):
                    yield line, fields
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(
            path, f"row {line + 1} cannot be read ({reason_of(error)})", "fix the csv"
        ) from None


def read_table(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a csv, and {number: row}. Raises UserError, also for a row of another width."""
    rows = read_rows(path)
    _, header = next(rows, (0, []))
    table = dict(rows)
    for line, fields in table.items():
        if len(fields) != len(header):
            raise UserError(
                path,
                f"row {line} has {len(fields)} fields, the header {len(header)}",
                "fix the csv",
            )
    return header, table
