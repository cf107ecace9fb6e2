"""How a command ends: one line on stderr and an exit code for every error, known or not."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from forerun.errors import ForerunError, SpaceError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

# Newer versions of typer ship their own copy of click, so its classes are found through typer.
_USAGE_ERROR = typer.BadParameter.__mro__[1]
_CLICK_ERROR = typer.BadParameter.__mro__[2]


class Interrupted(ForerunError):
    """Ctrl-C, after what was finished has been printed or written."""

    exit_code = EXIT_INTERRUPTED


class OutputClosed(Exception):
    """Standard output was closed by its reader, as in ``forerun generate ... | head -1``."""


def note(text: str) -> None:
    """Print one line for the person at the terminal, on stderr."""
    sys.stderr.write(f"forerun: {one_line(text)}\n")
    sys.stderr.flush()


def note_lines(text: str) -> None:
    """`note` for each line of a text."""
    for line in text.splitlines():
        note(line)


def one_line(text: str) -> str:
    """Return the text with all white space runs, line ends included, made single spaces."""
    return " ".join(str(text).split())


def guarded(
    call: Callable[[], int | None], arguments: Sequence[str] = (), *, show_traceback: bool = False
) -> int:
    """Run a command and turn whatever it raises into a line on stderr and an exit code.

    Args:
        call: the command; what it returns is the exit code, None means 0.
        arguments: the command line, for messages that repeat what was given.
        show_traceback: print the Python traceback of an error as well.

    Returns:
        0 when it went well, 2 for what the user can put right, 1 for failures, 130 after Ctrl-C,
        141 when the reader of standard output went away.
    """
    try:
        code = call() or 0
        sys.stdout.flush()
    except OutputClosed:
        return _drop_stdout()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_FAILURE
    except BaseException as error:
        if show_traceback:
            traceback.print_exception(error)
        message, code = describe(error, arguments)
        note(message)
        return code
    if code == EXIT_INTERRUPTED:
        note("interrupted")
    return code


def describe(error: BaseException, arguments: Sequence[str] = ()) -> tuple[str, int]:
    """Return the line that tells what went wrong, and the exit code that goes with it."""
    if isinstance(error, ForerunError):
        return str(error), error.exit_code
    if isinstance(error, _CLICK_ERROR):
        return _usage(error, arguments), EXIT_USAGE
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --capacity or an int4 bundle needs less", EXIT_USAGE
    name = type(error).__name__
    return f"unexpected {name}: {error}; forerun --traceback COMMAND shows where", EXIT_FAILURE


def _usage(error: BaseException, arguments: Sequence[str]) -> str:
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    message = message[:1].lower() + message[1:]
    option = getattr(getattr(error, "param", None), "opts", None)
    value = _given(option or (), arguments)
    if value is not None and repr(value) not in message:
        message = f"{message}, got {value!r}"
    return f"{message}; see {_command(error, arguments)} --help"


def _given(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            return value
        if argument in names and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _command(error: BaseException, arguments: Sequence[str]) -> str:
    # The parser's own errors (they have an option's name) may come without their command.
    context = getattr(error, "ctx", None)
    if context is not None or not hasattr(error, "option_name"):
        return context.command_path if context is not None else "forerun"
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(["forerun", *words[: 2 if words[:1] == ["bench"] else 1]])


def _system(error: OSError) -> tuple[str, int]:
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return f"{where}no space left on the disk; free some and run it again", SpaceError.exit_code
    # A file that is missing or may not be touched can be put right by whoever named it.
    fixable = isinstance(
        error,
        FileNotFoundError
        | PermissionError
        | IsADirectoryError
        | NotADirectoryError
        | FileExistsError,
    )
    return f"{where}{reason}", EXIT_USAGE if fixable and error.filename else EXIT_FAILURE


def _drop_stdout() -> int:
    # Python flushes stdout once more at exit; pointing it at nothing keeps that quiet.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)
    return EXIT_PIPE
