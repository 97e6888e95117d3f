"""Errors for people: one line that names the file or flag, the problem and the remedy."""

import contextlib
import difflib
import io
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any


class UserError(Exception):
    """A mistake that the user can fix: where it is, what is wrong, and how to fix it."""

    def __init__(self, where: Any, problem: str, remedy: str = "") -> None:
        """`where`: a file or a flag."""
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        """One line; what a file's content would do to a terminal is escaped."""
        text = f"{self.where}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
    texts = [str(item) for item in items]
    rest = f"{separator}... ({len(texts)} in all)" if len(texts) > 5 else ""
    return separator.join(texts[:5]) + rest


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what may have been meant, or all names."""
    names = {candidate.lower(): candidate for candidate in names}
    close = [names[n] for n in difflib.get_close_matches(name.lower(), list(names), 3, 0.4)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"one of {', '.join(names.values())}"
