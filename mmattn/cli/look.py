"""Verbs that look and change nothing: ``methods``, ``plan``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mmattn.cli import common
from mmattn.cli.common import (
    Config,
    Json,
    Kind,
    Methods,
    Set,
    Sites,
    emit,
    emit_json,
    guarded,
    option,
)

Markdown = Annotated[bool, option("--markdown", help="The table of the documentation.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("methods")(methods)
    app.command("plan")(plan)


@guarded
def methods(as_json: Json = False, markdown: Markdown = False, config: Config = None) -> None:
    """List the methods: seams, hosts, whether they need training, paper."""
    from mmattn.registry import markdown as as_markdown, method_class, names

    if markdown:
        emit(as_markdown())
        return
    rows: list[dict[str, Any]] = []
    for name in names():
        try:
            cls = method_class(name)
        except ImportError as error:
            common.say(f"mmattn: {name} cannot be loaded: {error}")
            continue
        first = (cls.__doc__ or "").strip().splitlines()
        rows.append(
            {
                "name": name,
                "seams": list(cls.seams),
                "kinds": list(cls.kinds),
                "hosts": list(cls.hosts),
                "training_free": cls.training_free,
                "paper": cls.paper,
                "summary": first[0] if first else "",
            }
        )
    if as_json:
        emit_json(rows)
        return
    table = [
        [
            row["name"],
            "/".join(row["seams"]),
            ", ".join(row["hosts"]),
            "no" if row["training_free"] else "yes",
            row["summary"],
        ]
        for row in rows
    ]
    emit(common.rows_as_text(["method", "seams", "hosts", "trained", "what it does"], table))


@guarded
def plan(
    model: Annotated[str, typer.Argument(help="t2i, t2v, vlm, vit, a folder, or a hub id.")],
    method: Methods = None,
    changes: Set = None,
    sites: Sites = None,
    kind: Kind = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Show which method would act at which site of a model, and why not elsewhere."""
    from mmattn.errors import ConfigError

    chosen = common.together(method, changes)
    if chosen is None:
        raise ConfigError("plan needs at least one method: mmattn plan t2v -m vmoba")
    common.quiet_libraries()
    from mmattn.loading import resolve
    from mmattn.planning import plan as make

    made = make(resolve(model, kind).target, list(chosen.methods), sites=sites or None)
    if as_json:
        emit_json(made.to_dict())
    else:
        emit(str(made))
    made.raise_if_empty()
