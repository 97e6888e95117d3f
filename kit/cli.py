"""A command line from a dataclass: one flag per field, the comment is its help."""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from kit.errors import UserError, first_five, reason_of


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
    helps = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            inside = [comments[line] for line in lines if line in comments]
            token = inside[-1] if inside else above.get(node.lineno - 1)
            comment = token.string.lstrip("# ") if token else ""
            limits = re.match(r"\[([-+.\de]*?)\.\.([-+.\de]*)\] *", comment)
            low, high = limits.groups() if limits else ("", "")
            text = comment[limits.end() :] if limits else comment
            helps[node.target.id] = FieldHelp(
                text, float(low or -math.inf), float(high or math.inf)
            )
    return helps


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError("flags", message, "--help lists them")


def parse(
    settings: type, doc: str, argv: list[str] | None = None, ignored: Iterable[str] = ()
) -> Any:
    """Read the command line into the dataclass. Raises UserError.

    A flag must be known, and its value must be one that its type and limits allow. A field `config`
    names a JSON file of values for the flags that are not given; `ignored`: names in it that are no
    settings, or not to be replayed.
    """
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints, comments = typing.get_type_hints(settings), field_help(settings)
    fields = dataclasses.fields(settings)
    for field in fields:
        kind, comment = hints[field.name], comments[field.name]
        default = getattr(settings(), field.name)
        shown = f"{default}".lower() if isinstance(default, bool) else default
        takes = ", ".join(filter(None, [describe_limits(comment).strip(), *literals(kind)]))
        takes = f" ({takes})" if takes else ""
        parser.add_argument(
            f"--{field.name}",
            type=functools.partial(convert, field.name, kind, comment),
            nargs="+" if typing.get_origin(kind) is list else None,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"{comment.text}{takes} [{shown}]".strip().replace("%", "%%"),
        )
    values, extra = parser.parse_known_args(argv)
    for text in extra:
        flags = [f"--{field.name}" for field in fields]
        close = difflib.get_close_matches(text.split("=")[0], flags, 1, 0.5)
        kind = "unknown flag" if text.startswith("-") else "unknown argument"
        raise UserError(
            f"{kind} {text}",
            "there is none",
            f"did you mean {close[0]}?" if close else "--help lists the flags",
        )
    given = vars(values)
    if given.get("config"):
        given = read_settings(settings, given["config"], set(ignored)) | given
    return settings(**given)


def read_settings(settings: type, path: str, ignored: set[str]) -> dict[str, Any]:
    """The values of a dataclass in a JSON file, such as config.json of a run. Raises UserError."""
    where = f"--config {path}"
    try:
        with open(path, encoding="utf-8") as file:
            content = dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        remedy = "name the config.json of a run, of --fold all that in fold0"
        raise UserError(where, reason_of(error), remedy) from None
    hints, comments = typing.get_type_hints(settings), field_help(settings)
    unknown = [name for name in content if name not in hints and name not in ignored]
    if unknown:
        problem = f"has settings that there are not: {first_five(unknown)}"
        raise UserError(where, problem, "take them out of the file")
    named = {name: value for name, value in content.items() if name not in ignored}
    return {
        name: convert(name, hints[name], comments[name], str(value))
        for name, value in named.items()
    }


def members(kind: Any) -> list[Any]:
    """The types that a type hint is a union of."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return list(typing.get_args(kind)) if union else [kind]


def literals(kind: Any) -> dict[str, Any]:
    """{text: value} of the Literals in a type hint."""
    hints = [member for member in members(kind) if typing.get_origin(member) is Literal]
    return {str(value): value for hint in hints for value in typing.get_args(hint)}


def convert(name: str, kind: Any, comment: FieldHelp, text: str) -> Any:
    """Turn a flag's text into a value of its type. Raises UserError that says what it takes."""
    choices, types_of_field = literals(kind), members(kind)
    if text in choices:
        return choices[text]
    if bool in types_of_field and text.lower() in ("true", "false"):  # Python writes True
        return text.lower() == "true"
    if str in types_of_field or typing.get_origin(kind) is list:
        return text
    takes = []
    for number, title in ((int, "a whole number"), (float, "a number")):
        if number in types_of_field:
            with contextlib.suppress(ValueError):  # not a number: the message below
                value = number(text)
                if math.isfinite(value) and comment.low <= value <= comment.high:
                    return value
            takes.append(title + describe_limits(comment))
    takes += ["true", "false"] if bool in types_of_field else []
    raise UserError(f"--{name} {text}", f"takes {' or '.join([*takes, *choices])}")


def describe_limits(comment: FieldHelp) -> str:
    """Such as " from 0 to 1"."""
    low = f" from {comment.low:.10g}" if comment.low > -math.inf else ""
    return low + (f" to {comment.high:.10g}" if comment.high < math.inf else "")


def check_fields(settings: Any) -> None:
    """Raise ValueError or UserError for a dataclass whose values leave their types or limits."""
    comments = field_help(type(settings))
    for name, kind in typing.get_type_hints(type(settings)).items():
        is_tuple = typing.get_origin(kind) is tuple
        item_kind = typing.get_args(kind)[0] if is_tuple else kind
        values = getattr(settings, name)
        for value in values if is_tuple else [values]:
            same = convert(name, item_kind, comments[name], str(value))
            if same != value or isinstance(value, bool) != isinstance(same, bool):
                raise ValueError(f"{name} is {values!r}")
