"""The ``mmattn`` command. Nothing here imports torch; verbs import what they need when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mmattn import __version__
from mmattn.cli import batch, demo, doctor, evaluate, look, make, mini, train, tune, weigh

app = typer.Typer(
    name="mmattn",
    help="Attach published attention techniques to models you have, and see what they do.",
    epilog="Every option can also be set by MMATTN_<OPTION> or in the file given with --config; "
    "flags win over the environment, the environment over the file. Results go to stdout, everything "
    "else to stderr. Exit codes: 0 ok, 2 usage, 3 some items failed, 4 nothing done, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
look.register(app)
doctor.register(app)
make.register(app)
batch.register(app)
weigh.register(app)
evaluate.register(app)
tune.register(app)
demo.register(app)
app.add_typer(train.app, name="train", help="Train adapters, such as In-Context LoRAs.")
app.add_typer(mini.app, name="mini", help="The embedded models: list, train, verify.")


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"mmattn {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Before torch is loaded: spinning OpenMP threads make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mmattn")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0
