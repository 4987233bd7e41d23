"""The `spa-lite` command."""

from __future__ import annotations

import os
import sys
from signal import Signals
from typing import Annotated

import typer

from spa_lite.errors import RecipeError, SpaError

app = typer.Typer(
    name="spa-lite",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda t: t.replace("_", "-")},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"spa-lite {version('spa-lite')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Align a language model from a handful of preferences, on one computer (SPA, ICLR 2025)."""


def main() -> None:
    """Run a command; explain a failure in one sentence. Exit codes: 1 failure, 2 usage, 130 Ctrl-C, 143 SIGTERM."""
    from spa_lite.cli import commands  # noqa: F401 - registers the commands
    from spa_lite.cli.render import fail, note
    from spa_lite.interrupt import EXIT_CODES, raised

    try:
        with raised() as caught:
            code = app(standalone_mode=False) or 0
        if code == 130:  # how Typer returns from KeyboardInterrupt
            kept = "everything so far is kept: run the same command again to go on"
            name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
            note(f"interrupted; {kept}" if name in {"run", "ablate", "eval", "compare", "sft"} else "interrupted")
            code = next((EXIT_CODES[Signals(number)] for number in caught), 130)
        sys.exit(code)
    except SpaError as error:
        if "--debug" in sys.argv:
            raise
        fail(str(error))
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except typer.TyperException as error:
        fail(f"{error.format_message()} (spa-lite --help, or COMMAND --help, lists what there is)")
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away: nothing to explain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a permission, a path that is gone: whatever nobody nearer explained
        if "--debug" in sys.argv:
            raise
        fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}; nothing finished is lost")
        sys.exit(1)
