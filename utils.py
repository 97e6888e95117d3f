"""Errors for people, the command line from a dataclass, files, csv. Needs no library."""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import functools
import inspect
import io
import math
import os
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

# --------------------------------------------------------------------------------------------------
#  Errors
# --------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can fix. The message names the file or flag and the remedy."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit status 2; others keep their traceback.

    Of several processes, such as torchrun's, the first one alone prints to stdout.
    """
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    stdout = contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO())
    try:
        with stdout:
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, at most 120 characters."""
    return textwrap.shorten(str(error).strip().split("\n")[0], 120) or type(error).__name__


def first_five(items: Iterable[Any], separator: str = ", ") -> str:
    """The first five of a list for a message, and how many there are when there are more."""
    words = [str(item) for item in items]
    rest = f"{separator}... ({len(words)} in all)" if len(words) > 5 else ""
    return separator.join(words[:5]) + rest


def closest(name: str, names: list[str]) -> str:
    """The end of a message about an unknown name: what may have been meant, or all names."""
    lower = {known.lower(): known for known in names}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), list(lower), 3, 0.4)]
    return f"; did you mean {' or '.join(close)}?" if close else f"; one of {', '.join(names)}"


# --------------------------------------------------------------------------------------------------
#  Settings: a dataclass is a command line
# --------------------------------------------------------------------------------------------------


class FieldHelp(NamedTuple):
    """What the comment of a dataclass field says."""

    text: str = ""
    low: float = -math.inf
    high: float = math.inf


@functools.cache
def field_help(settings: type) -> dict[str, FieldHelp]:
    """Read each field's comment: at the end of its line, else on the line above; absent is fine.

    A comment that starts with `[low..high]` limits a number; either end may be absent.
    """
    source = textwrap.dedent(inspect.getsource(settings))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    above = {line: token for line, token in comments.items() if token.line.lstrip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            inside = [comments[line] for line in lines if line in comments]
            token = inside[-1] if inside else above.get(node.lineno - 1)
            comment = token.string.lstrip("# ") if token else ""
            limits = re.match(r"\[([-+.\de]*?)\.\.([-+.\de]*)\] *", comment)
            low, high = limits.groups() if limits else ("", "")
            found[node.target.id] = FieldHelp(
                comment[limits.end() :] if limits else comment,
                float(low or -math.inf),
                float(high or math.inf),
            )
    return found


def parse(settings: type, doc: str, argv: list[str] | None = None) -> Any:
    """Make a command line from a dataclass: one flag per field, the comment is its help.

    Raises UserError for an unknown flag or a value that its type or limits do not allow.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UserError(f"{message} (--help lists the flags)")

    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(settings)
    comments = field_help(settings)
    fields = dataclasses.fields(settings)
    for field in fields:
        kind, comment = hints[field.name], comments[field.name]
        missing = field.default is dataclasses.MISSING
        default = field.default_factory() if missing else field.default
        shown = f"{default}".lower() if isinstance(default, bool) else default
        takes = ", ".join(filter(None, [limits_in_words(comment).strip(), *words_of(kind)]))
        takes = f" ({takes})" if takes else ""
        parser.add_argument(
            f"--{field.name}",
            type=functools.partial(convert, field.name, kind, comment),
            nargs="+" if typing.get_origin(kind) is list else None,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"{comment.text}{takes} [{shown}]".strip().replace("%", "%%"),
        )
    known, extra = parser.parse_known_args(argv)
    for word in extra:
        flags = [f"--{field.name}" for field in fields]
        close = difflib.get_close_matches(word.split("=")[0], flags, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else " (--help lists the flags)"
        raise UserError(f"unknown {'flag' if word.startswith('-') else 'argument'} {word}{hint}")
    return settings(**vars(known))


def members(kind: Any) -> list[Any]:
    """The types that a type hint is a union of."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return list(typing.get_args(kind)) if union else [kind]


def words_of(kind: Any) -> dict[str, Any]:
    """{text: value} of the Literals in a type hint."""
    literals = [part for part in members(kind) if typing.get_origin(part) is Literal]
    return {str(value): value for part in literals for value in typing.get_args(part)}


def convert(name: str, kind: Any, comment: FieldHelp, text: str) -> Any:
    """Turn a flag's text into a value of its type. Raises UserError that says what it takes."""
    words, parts = words_of(kind), members(kind)
    if text in words:
        return words[text]
    if bool in parts and text.lower() in ("true", "false"):  # Python writes True
        return text.lower() == "true"
    if str in parts or typing.get_origin(kind) is list:
        return text
    wanted = []
    for number, title in ((int, "a whole number"), (float, "a number")):
        if number in parts:
            with contextlib.suppress(ValueError):  # not a number: the message below
                value = number(text)
                if math.isfinite(value) and comment.low <= value <= comment.high:
                    return value
            wanted.append(title + limits_in_words(comment))
    wanted += ["true", "false"] if bool in parts else []
    raise UserError(f"--{name} {text}: takes {' or '.join([*wanted, *words])}")


def limits_in_words(comment: FieldHelp) -> str:
    """Such as " from 0 to 1"."""
    low = f" from {comment.low:.10g}" if comment.low > -math.inf else ""
    return low + (f" to {comment.high:.10g}" if comment.high < math.inf else "")


def check_fields(settings: Any) -> None:
    """Raise ValueError or UserError for a dataclass whose values leave their types or limits."""
    comments = field_help(type(settings))
    for name, kind in typing.get_type_hints(type(settings)).items():
        many = typing.get_origin(kind) is tuple
        value = getattr(settings, name)
        for one in value if many else [value]:
            one_kind = typing.get_args(kind)[0] if many else kind
            same = convert(name, one_kind, comments[name], str(one))
            if same != one or isinstance(one, bool) != isinstance(same, bool):
                raise ValueError(f"{name} is {value!r}")


# --------------------------------------------------------------------------------------------------
#  Files
# --------------------------------------------------------------------------------------------------


def writable_folder(out: str | Path) -> Path:
    """Make the folder and try to write in it. Raises UserError where that fails."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").write_bytes(b"")
        (folder / ".write_test").unlink(missing_ok=True)  # another process may have been quicker
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); name another folder"
        raise UserError(f"--out {out}: {reason}") from None
    return folder


def write_file(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a file under its final name is always whole.

    Raises UserError where the disk is full or the folder is gone or read-only.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or reason_of(error)})"
        raise UserError(f"{path}: {reason}; free space there or name another --out") from None
    finally:
        with contextlib.suppress(OSError):  # gone with its folder
            part.unlink(missing_ok=True)


def check_file(path: str | Path) -> None:
    """Raise OSError for a folder, a device, or a pipe, which a reader might wait for forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("a folder, pipe or device, not a file")


# --------------------------------------------------------------------------------------------------
#  csv
# --------------------------------------------------------------------------------------------------

ID_COLUMNS = {
    "id", "imageid", "image_id", "img", "record_id", "image", "filename", "file_name",
}  # fmt: skip
MAX_FIELD = 64 << 20  # characters in one field of a csv


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
        reason = f"row {line + 1} cannot be read ({reason_of(error)}); fix the csv"
        raise UserError(f"{path}: {reason}") from None


def read_table(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a csv, and {number: row}. Raises UserError, also for a row of another width."""
    rows = read_rows(path)
    _, header = next(rows, (0, []))
    table = dict(rows)
    for line, fields in table.items():
        if len(fields) != len(header):
            counts = f"{len(fields)} fields, the header {len(header)}"
            raise UserError(f"{path}: row {line} has {counts}; fix the csv")
    return header, table


def id_matcher(stems: Iterable[str]) -> Callable[[str], str]:
    """A function from an id of a csv to the image's stem that it means; "" for none.

    An id may be a path of any system, have a suffix, have another case, and lack leading zeros.
    """

    def simplified(name: str) -> str:
        name = name.casefold()
        return name.lstrip("0") or "0" if name.isdigit() else name

    exact, loose = set(stems), {}
    for stem in sorted(exact):
        loose[simplified(stem)] = "" if simplified(stem) in loose else stem  # "": two images

    def match(name: str) -> str:
        base = re.split(r"[\\/]", name)[-1]
        names = (name, base, re.sub(r"\.[A-Za-z0-9]{1,5}$", "", base))
        known = next((each for each in names if each in exact), "")
        return known or next((loose[n] for n in map(simplified, names) if n in loose), "")

    return match


def id_column(
    header: list[str], rows: list[list[str]], column: int, match: Callable[[str], str]
) -> int:
    """The column with the most ids of images, else the one whose name says so, else the first."""

    def rank(other: int) -> tuple[int, bool, int]:
        matched = {row[other]: match(row[other]) for row in rows}
        exact = sum(value == stem for value, stem in matched.items())
        known = sum(stem != "" for stem in matched.values())
        return known, header[other].lower() in ID_COLUMNS, exact

    return max((c for c in range(len(header)) if c != column), key=rank)
