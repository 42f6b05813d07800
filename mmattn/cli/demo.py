"""``demo``: the pages in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmattn.cli import common
from mmattn.cli.common import Config, Device, Quiet, guarded, option, say

NAMES = ("image", "video", "imagesets", "vlm", "tokens", "bench")


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("demo")(demo)


@guarded
def demo(
    name: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(NAMES)}; without it all, as tabs.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        option("--model", help="Folder of a model (safetensors) to use; repeatable, one per kind."),
    ] = None,
    host: Annotated[
        str, option("--host", help="Address to listen at; others than loopback need --auth.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        option("--port", min=1, max=65535, help="Port; by default a free one from 7860."),
    ] = None,
    auth: Annotated[
        str | None,
        option("--auth", help="user:password. In MMATTN_AUTH it does not show in process lists."),
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Open the demos in a browser: methods beside the untouched model, on your inputs.

    Without --model they run on the embedded models, on a CPU. Nothing is fetched or sent anywhere.
    """
    from mmattn.errors import ConfigError, suggest

    if name is not None and name not in NAMES:
        raise ConfigError(
            f"unknown demo {name!r}{suggest(name, NAMES)} Choose one of {list(NAMES)}."
        )
    from mmattn_demos.serving import credentials, gradio, serve

    credentials(auth, host)
    common.check_device(device)
    gradio()
    if not quiet:
        say("loading libraries")
    common.quiet_libraries()
    from importlib import import_module

    from mmattn_demos.models import Models

    models = Models(model or (), device=device)
    blocks = import_module(f"mmattn_demos.{name or 'app'}").build(models)
    address = serve(blocks, host=host, port=port, auth=auth, wait=False)
    if not quiet:
        say(f"open {address} in a browser; Ctrl-C ends it")
    blocks.block_thread()
