"""The command line `vico`. Exit codes: 0 done, 1 failed, 2 bad input, 130 and 143 stopped by a signal."""

import errno
import logging
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import pipeline.one_place  # noqa: F401
import vico

# isort: split
from cluster.sources.in_worker import leave_no_core
from pipeline.commands import data as cli_data
from pipeline.commands import explain as cli_explain
from pipeline.commands import init as cli_init
from pipeline.commands import model as cli_model
from pipeline.commands import runs as cli_runs
from pipeline.commands import site as cli_site
from pipeline.terminal.output import filter_standard_streams, print_errors, terminal
from stages.stops import Interrupted
from vico.errors import Unreachable, UserError, one_line

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train InternVL-style models to spend few visual tokens on simple tiles and many on rich ones.",
)
COMMANDS: tuple[Callable[..., None], ...] = (  # in the order of `vico --help`
    cli_init.init,
    cli_runs.run,
    cli_runs.submit,
    cli_runs.plan,
    cli_runs.status,
    cli_runs.logs,
    cli_runs.cancel,
    cli_explain.report,
    cli_explain.audit,
    cli_explain.diff,
    cli_explain.reproduce,
    cli_explain.gc,
    cli_model.route,
    cli_model.export,
    cli_model.serve,
)
DATA_COMMANDS: tuple[Callable[..., None], ...] = (cli_data.check, cli_data.build, cli_data.retry)
_FAULTS_OF_PATHS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""Errors of the file system that say something about a path that was given, not about the program."""


def _show_version(is_asked: bool) -> None:
    if is_asked:
        terminal().line(f"vico {vico.__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    # no docstring: the help of `app` describes the whole
    pass


for command in COMMANDS:
    app.command()(command)
data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Check, build and repair shards.",
)
for command in DATA_COMMANDS:
    data_app.command()(command)
app.add_typer(data_app, name="data")
site_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check sites.")
site_app.command()(cli_site.check)


@site_app.callback()
def _sites() -> None:
    """Check sites."""


app.add_typer(site_app, name="site")


def _refuse_other_encodings() -> None:
    """Raise UserError if names of files are not UTF-8 here: pictures with other letters would be missing."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise UserError(
            f"the locale has the encoding {encoding}, in which files of many names cannot be opened; set "
            "PYTHONUTF8=1, or a locale such as C.UTF-8"
        )


def _log_instead(record: logging.LogRecord) -> bool:
    """Give a record to the handlers of the root logger, and keep it from those of its own."""
    logging.getLogger().handle(record)
    return False


def main() -> None:
    """Run the command line.

    A UserError becomes one `error:` line per fault and exit code 2, and so does a path that cannot be used.
    """
    # Logs and Python's warnings, such as Pillow's of large pictures, go to files of the run. Without a
    # handler, logging would print them to the terminal.
    logging.getLogger().addHandler(logging.NullHandler())
    leave_no_core()
    logging.captureWarnings(True)
    # DeepSpeed's logger writes to standard output. Stages import it here only to name the functions of their
    # ranks, and where DS_ACCELERATOR is not set it warns that this process has no GPU.
    logging.getLogger("DeepSpeed").addFilter(_log_instead)
    filter_standard_streams()
    try:
        _refuse_other_encodings()
        app()
    except UserError as error:
        print_errors(str(error))
        sys.exit(2)
    except Unreachable as error:
        print_errors(str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in _FAULTS_OF_PATHS or not error.filename:
            raise
        path = one_line(str(error.filename))
        print_errors(f"{path}: {error.strerror}; give another path, or fix permissions and space there")
        sys.exit(2)
    except Interrupted as stop:  # before a run began; later its driver decides
        sys.exit(128 + signal.Signals[str(stop)])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
