"""The `gspn2convert` command: one click group, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 failed or interrupted, 2 wrong use or unusable input.
"""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from gspn2convert.commands import bench, build_ops, demo, describe, distill, doctor, evaluate, export, recipes, run
from gspn2convert.commands.report import write_json
from gspn2convert.errors import UserError, is_disk_full, is_out_of_memory
from gspn2convert.interrupt import Interrupted

FAILED, WRONG_USE = 1, 2


class Program(click.Group):
    """A group that turns every error into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]  # noqa: ANN401
        """Run the command line and leave the interpreter with its exit code."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra |= {"standalone_mode": False, "prog_name": "gspn2convert"}
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # for names of files that a terminal cannot show
        _start_logging(debug="--debug" in arguments)
        try:
            code = super().main(arguments, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except (Exception, click.Abort) as error:  # noqa: BLE001 - the last resort of a command line
            sys.exit(_report(error, arguments))


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one-line message for an error."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "gspn2convert"
        return WRONG_USE, f"{error.format_message().rstrip('.')} (see {command} -h)"
    if isinstance(error, UserError):
        return WRONG_USE, str(error)
    if isinstance(error, click.ClickException):
        return FAILED, error.format_message()
    if isinstance(error, Interrupted):
        return FAILED, f"{error} (the same command with --resume)"
    if isinstance(error, click.Abort):
        return FAILED, "interrupted"
    if isinstance(error, OSError) and is_disk_full(error):
        where = f" at {error.filename}" if error.filename else ""
        return WRONG_USE, f"disk full{where}: make room, then run the same command again"
    # PyTorch's errors go on with a list of calls in C++.
    what, *_ = str(error).split("\nException raised from")
    if is_out_of_memory(error):
        return WRONG_USE, f"out of memory: take smaller images or fewer at a time ({what or type(error).__name__})"
    return FAILED, f"{type(error).__name__}: {what} (internal; --debug shows the traceback)"


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    code, message = explain(error)
    line = " ".join(message.split())
    if "--debug" in arguments:
        traceback.print_exception(error)
    if "--json" in arguments and _is_first_process():
        with contextlib.suppress(OSError):  # which stdout may be what failed
            write_json({"error": line})
    click.echo(f"error: {line}", err=True)
    return code


def _is_first_process() -> bool:
    """Of what all processes of a run do alike, the first one tells; torchrun and `accelerate launch` number them."""
    return os.environ.get("RANK", "0") == "0"


class _ToStderr(logging.Handler):
    """Log lines go where stderr is now, so that a progress bar or a test that took it over sees them."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def _start_logging(*, debug: bool) -> None:
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logging.DEBUG if debug else logging.INFO
    if not _is_first_process():
        level = logging.WARNING
    for name in ("gspn2convert", "gspn2_kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: gspn2convert distill --teacher demo --output out, then gspn2convert export out",
)
@click.version_option(None, "--version", package_name="gspn2convert", message="%(package)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def main() -> None:
    """Turn a pretrained Vision Transformer into a GSPN-2 one."""


for _module in (distill, evaluate, export, run, build_ops, describe, bench, recipes, doctor, demo):
    main.add_command(_module.command)
