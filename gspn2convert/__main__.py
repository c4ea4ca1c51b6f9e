"""`python -m gspn2convert` is the `gspn2convert` command."""

from gspn2convert.cli import main

main()
