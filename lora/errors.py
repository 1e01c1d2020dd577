"""Mistakes that the user can mend: one line that says what, where and how.

Code that meets one raises `UserError`; code that can meet several gathers them and raises them together, so that nobody
mends a file one line at a time. The scripts print each as `error: <what> (<where>): <how to mend>` and exit with code
2.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """One or more problems, each a line `<what> (<where>): <how to mend>`.

    >>> raise UserError("no such folder", "--model llama", "give a folder, a hub id or smollm2-135m")
    """

    def __init__(self, what: str, where: str, how: str):
        self.problems = [f"{what} ({where}): {how}"]
        super().__init__(self.problems[0])

    @classmethod
    def raise_all(cls, errors: Iterable[UserError], most: int = 20) -> None:
        """Raises several errors as one, in the order found; of very many, the first `most`; of none, nothing."""
        problems = [problem for error in errors for problem in error.problems]
        if not problems:
            return
        joined = cls.__new__(cls)
        joined.problems = problems[:most]
        if len(problems) > most:
            joined.problems.append(f"and {len(problems) - most} more problems (as above): mend these first")
        Exception.__init__(joined, "\n".join(joined.problems))
        raise joined


def caught(call: Callable[..., T], *arguments) -> T | UserError:
    """What the call returns, or the UserError that it raises: for gathering them."""
    try:
        return call(*arguments)
    except UserError as error:
        return error


def exit_code(main: Callable[[list[str]], int]) -> int:
    """Runs a script's `main` on the command line: its result, or 2 after printing what the user can mend, or 130."""
    argv = sys.argv[1:]
    try:
        return main(argv)
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as error:
        if "--debug" in argv:
            traceback.print_exc()
        where = error.filename or "the file system"
        print(f"error: {error.strerror or error} ({where}): check the place and the room on the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
