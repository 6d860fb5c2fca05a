"""The command line: one file per command, without logic of its own."""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from chai_attention.cli import options
from chai_attention.cli.bench import bench_app
from chai_attention.cli.calibrate import calibrate_command
from chai_attention.cli.demo import demo_command
from chai_attention.cli.eval import eval_command
from chai_attention.cli.export import export_command
from chai_attention.cli.failures import explain, one_line, require_text
from chai_attention.cli.frontier import frontier_command
from chai_attention.cli.generate import generate_command
from chai_attention.cli.inspect import inspect_command
from chai_attention.cli.output import warnings_as_notes
from chai_attention.cli.redundancy import redundancy_command
from chai_attention.cli.report import report_command
from chai_attention.cli.serve import PASSED_ON, ServeCommand, serve_command

app = typer.Typer(
    help="Clustered Head Attention: cheaper LLM inference by sharing attention between heads.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"chai-attention {version('chai-attention')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _chai(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    options.help_without_command(context)


app.command("calibrate")(calibrate_command)
app.command("inspect")(inspect_command)
app.command("generate")(generate_command)
app.command("demo")(demo_command)
app.command("export")(export_command)
app.command("frontier")(frontier_command)
app.command("eval")(eval_command)
app.command("redundancy")(redundancy_command)
app.command("report")(report_command)
app.command("serve", cls=ServeCommand, context_settings=PASSED_ON)(serve_command)
app.add_typer(bench_app, name="bench")


# typer brings its own copy of click from 0.20 on; this is ClickException of whichever it uses
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main() -> None:
    """Run the command line; an error that a user can fix is one line, with exit code 2."""
    # our own progress bars are enough; transformers' loading bars would come on top
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        require_text(sys.argv[1:])
        with warnings_as_notes():
            code = app(sys.argv[1:], prog_name="chai", standalone_mode=False)
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()  # a full disk is told here, not when Python ends
    except _UsageError as error:
        _fail(f"{error.format_message()} (see chai --help)")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        # a second one would only break into what libraries do when Python ends, which prints traces
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)
    except Exception as error:
        if (reason := explain(error)) is not None:
            _fail(reason)
        if not isinstance(error, OSError):
            raise
        _let_go_of_stdout()
        if error.errno == errno.EPIPE:  # whoever read has seen enough
            sys.exit(1)
        _fail(f"cannot write the output: {error.strerror}")
    sys.exit(code if isinstance(code, int) else 0)


def _let_go_of_stdout() -> None:
    """Discard what could not be written: Python would try again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    if sys.stderr is not None:  # None would print it among the results
        print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
