"""What the verbs share: streams, errors, options, and the configuration file."""

from __future__ import annotations

import functools
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mmattn.errors import ConfigError, MmattnError, suggest

if TYPE_CHECKING:
    from mmattn.variants import Variant

F = TypeVar("F", bound=Callable[..., Any])

USAGE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 2, 3, 4, 130


def say(line: str) -> None:
    """One line for people, on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def emit(text: str) -> None:
    """A result, on stdout."""
    # A file's name need not be text.
    text = text.encode("utf-8", "backslashreplace").decode()
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def emit_json(data: Any) -> None:
    """A result as JSON, on stdout."""
    emit(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def guarded(verb: F) -> F:
    """Turn our errors, and those of the file system, into one sentence and exit code 2, Ctrl-C into 130."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except MmattnError as error:
            say("mmattn: " + " ".join(str(error).split()))
            raise typer.Exit(USAGE) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            say(f"mmattn: {where}{error.strerror or error}")
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt:
            say("mmattn: interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run  # type: ignore[return-value]


def quiet_libraries() -> None:
    """Progress bars and advice of the host libraries off; errors stay."""
    import importlib
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# -- options ----------------------------------------------------------------------------------------


def option(*names: str, help: str, **more: Any) -> Any:
    """An option that ``MMATTN_<NAME>`` can set too."""
    long = next(name for name in names if name.startswith("--"))
    variable = "MMATTN_" + long.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable, show_envvar=False, **more)


def _config(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is not None and not ctx.resilient_parsing:
        try:
            settings = read_config(value, ctx.command.name or "", _known(ctx))
        except ConfigError as error:
            say("mmattn: " + " ".join(str(error).split()))
            raise typer.Exit(USAGE) from None
        names = {key_of(parameter): str(parameter.name) for parameter in ctx.command.params}
        own = {names[key]: entry for key, entry in settings.items()}
        ctx.default_map = {**(ctx.default_map or {}), **own}
    return value


def key_of(parameter: Any) -> str:
    """What a parameter is called in a configuration file: its long option name, or that of an argument."""
    longest = next((name for name in parameter.opts if name.startswith("--")), str(parameter.name))
    return longest.removeprefix("--").replace("-", "_")


def _known(ctx: typer.Context) -> dict[str, set[str]]:
    """Option names by verb."""
    own = set(map(key_of, ctx.command.params))
    known = {ctx.command.name or "": own}
    parent = ctx.find_root().command
    for name, command in getattr(parent, "commands", {}).items():
        known.setdefault(name, set(map(key_of, command.params)))
    return known


def read_config(path: Path, verb: str, known: dict[str, set[str]]) -> dict[str, Any]:
    """Settings for `verb` from a TOML or JSON file.

    Keys are the long option names. A table named after a verb holds for that verb alone; keys outside
    hold for every verb that has them. ``[[method]]`` tables are methods, as in a recipe.

    Raises:
        ConfigError: when the file is missing, not valid, or has a key that nothing reads.
    """
    if not path.is_file():
        raise ConfigError(f"there is no configuration file at {path}")
    kind = "json" if path.suffix == ".json" else "toml"
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if kind == "json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of settings, found {type(data).__name__}")
    everything = set().union(*known.values()) - {"config"}
    settings: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in data.items():
        if key in known and isinstance(value, dict):
            for inner, entry in value.items():
                name = inner.replace("-", "_")
                if name not in known[key] - {"config"}:
                    hint = suggest(name, known[key])
                    raise ConfigError(f"{path}: [{key}] has the unknown key {inner!r}{hint}")
                if key == verb:
                    own[name] = entry
            continue
        name = key.replace("-", "_")
        if name not in everything:
            hint = suggest(name, everything | set(known))
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")
        if name in known[verb]:
            settings[name] = value
    merged = {**settings, **own}
    if isinstance(merged.get("method"), list):
        try:
            merged["method"] = [
                json.dumps(entry) if isinstance(entry, dict) else entry
                for entry in merged["method"]
            ]
        except TypeError as error:  # TOML has dates
            raise ConfigError(
                f"{path}: a method has a setting of an unknown type: {error}"
            ) from error
    return merged


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="MMATTN_CONFIG",
        show_envvar=False,
        help="TOML or JSON file with settings.",
        callback=_config,
        is_eager=True,
    ),
]
Json = Annotated[bool, option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress on stderr.")]
Methods = Annotated[
    list[str] | None,
    option("--method", "-m", help="name, name:key=value,key=value, or several joined by +."),
]
Set = Annotated[
    list[str] | None, option("--set", help="Change a setting: key=value or method.key=value.")
]
Sites = Annotated[list[str] | None, option("--sites", help="Glob on site paths; repeatable.")]
Kind = Annotated[str | None, option("--kind", help="What a hub id is: t2i, t2v, vlm or vit.")]
Seed = Annotated[int, option("--seed", help="Seed of noise, inputs and random methods.")]
Device = Annotated[str, option("--device", help="Torch device, such as cpu or cuda.")]
Out = Annotated[Path, option("--out", "-o", help="Folder for the files.")]


def columns(methods: Sequence[str] | None, changes: Sequence[str] | None) -> list[Variant]:
    """One column per ``-m``, with ``--set`` applied."""
    from mmattn.variants import override, parse

    chosen = [parse(text) for text in methods or ()]
    return override(chosen, changes or ())


def together(methods: Sequence[str] | None, changes: Sequence[str] | None) -> Variant | None:
    """All ``-m`` attached to one model at once, or None."""
    from mmattn.variants import variant

    chosen = columns(methods, changes)
    every = [method for column in chosen for method in column.methods]
    return variant(every) if every else None


def check_device(name: str) -> str:
    """`name`, if this machine has it.

    Raises:
        ConfigError: otherwise.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {name!r}; use cpu, cuda or another torch device"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device that torch can use; try --device cpu")
    return name


def rows_as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table with aligned columns."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join(lines)
