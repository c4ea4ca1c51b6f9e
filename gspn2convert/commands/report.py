"""What all commands share: a result that is shown to people as text and given to machines as JSON."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
_JSON_KEY = "gspn2convert.json"

Document = dict[str, Any]
Show = Callable[[Document, "Console"], None]


class ReportCommand(click.Command):
    """A command whose function returns a document; `--json` prints it, otherwise `show` puts it in words."""

    def __init__(self, *args: Any, show: Show, **kwargs: Any) -> None:
        """Take click's arguments and `show(document, console)`."""
        super().__init__(*args, **kwargs)
        self._show = show
        self.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document, and nothing else."),
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an empty value, which is a variable of the shell that was not set, and would mean something else."""
        valued = {name for one in self.params if isinstance(one, click.Option) and not one.is_flag for name in one.opts}
        rest = iter(args)
        for each in rest:
            name, equals, value = each.partition("=")
            if name in valued:
                value = value if equals else next(rest, "missing")
            else:
                name, value = "an argument", each
            if not value:
                raise click.UsageError(f"{name} is given, but empty; give a value, or leave it out", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command and give its document to whoever asked."""
        as_json = ctx.meta[_JSON_KEY] = ctx.params.pop("as_json")
        # Libraries that print must not spoil the document.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            document = super().invoke(ctx)
        if as_json:
            write_json(document)
        else:
            self._show(document, make_console())
        if not document.get("ok", True):
            ctx.exit(1)


def wants_json() -> bool:
    """Whether the running command was asked for JSON."""
    return bool(click.get_current_context().meta[_JSON_KEY])


def write_json(document: Document) -> None:
    """Print a document to stdout; numbers that JSON lacks (NaN, infinity) become null."""
    click.echo(json.dumps(plain(document), indent=2, allow_nan=False))


def plain(value: Any) -> Any:  # noqa: ANN401
    """Turn dataclasses, mappings, sequences and paths into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def percent(share: float) -> str:
    """Write a share of 0..1 in per cent."""
    return f"{100 * share:.2f} %"


def millions(count: int) -> str:
    """Write a large count in millions, with three digits or more."""
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gibi(size: int) -> str:
    """Write a size in bytes in GiB or, where it is small, in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def make_console() -> "Console":
    """Return a console for stdout, at most 100 columns wide, without colours where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def show_table(
    console: "Console", columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True
) -> None:
    """Print rows under their columns; numbers stand to the right, in all columns but the first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index and numbers else "left")
    for row in rows:
        table.add_row(*map(_on_one_line, row))
    console.print(table)


def _on_one_line(cell: str) -> str:
    """Write out what would break a row in two, such as a line feed in the name of a file."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in cell)
