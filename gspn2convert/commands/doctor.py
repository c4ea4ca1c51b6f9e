"""`gspn2convert doctor`: what this installation can do and what would mend it."""

from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands.report import Document, ReportCommand, plain, show_table

if TYPE_CHECKING:
    from rich.console import Console


def _show(document: Document, console: "Console") -> None:
    checks = document["checks"]
    show_table(console, ("check", "", "found"), [(c["name"], _word(c), c["value"]) for c in checks], numbers=False)
    remedies = [check for check in checks if not check["ok"]]
    if not remedies:
        console.print("Everything is in place.")
    for check in remedies:
        console.print(f"To mend {check['name']}: {check['remedy']}")


def _word(check: dict[str, Any]) -> str:
    if check["ok"]:
        return "ok"
    return "FAILED" if check["required"] else "warning"


@click.command("doctor", cls=ReportCommand, show=_show)
def command() -> dict[str, Any]:
    """Show what is installed, and what mends the rest."""
    from gspn2convert.doctor import report

    checks = report()
    return {"ok": all(check.ok for check in checks if check.required), "checks": plain(checks)}
