"""Verbs that look and change nothing: ``methods``, ``plan``, ``doctor``."""

from __future__ import annotations

import platform
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
    app.command("doctor")(doctor)


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


def _extras() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    packages = {
        "clip": "open_clip_torch",
        "demo": "gradio",
        "xformers": "xformers",
        "train": "peft",
        "ray": "ray",
        "eval": "torchmetrics",
    }
    found: dict[str, str | None] = {}
    for extra, package in packages.items():
        try:
            found[extra] = f"{package} {version(package)}"
        except PackageNotFoundError:
            found[extra] = None
    return found


@guarded
def doctor(as_json: Json = False, config: Config = None) -> None:
    """Check this installation: libraries, devices, kernels, embedded models, video encoder."""
    from dataclasses import asdict

    import torch

    from mmattn import __version__
    from mmattn.batch.writers import video_encoder
    from mmattn.measuring import package_versions
    from mmattn.mini import manifest

    devices = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        devices += [
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
    versions = package_versions()
    usable = versions["triton"] is not None and torch.cuda.is_available()
    checks = [manifest.check(name) for name in manifest.NAMES]
    data = {
        "mmattn": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
        "triton_kernels": usable,
        "embedded": [{**asdict(check), "ok": check.ok} for check in checks],
        "video_encoder": video_encoder() or "animated WebP",
        "extras": _extras(),
    }
    if as_json:
        emit_json(data)
    else:
        emit(_doctor_text(data))
    if not all(check.ok for check in checks):
        raise typer.Exit(common.SOME_FAILED)


def _doctor_text(data: dict[str, Any]) -> str:
    rows = [["mmattn", data["mmattn"]], ["python", data["python"]]]
    rows += [[name, text or "missing"] for name, text in data["versions"].items()]
    rows += [["device", text] for text in data["devices"]]
    why = "ready" if data["triton_kernels"] else "not usable here; the torch versions run instead"
    rows.append(["triton kernels", why])
    for check in data["embedded"]:
        state = f"ok, {check['files']} files, {check['bytes'] / 2**20:.1f} MB"
        rows.append(
            [f"model {check['name']}", state if check["ok"] else "; ".join(check["problems"][:3])]
        )
    rows.append(["video", data["video_encoder"]])
    rows += [
        [f"extra [{extra}]", text or f"missing; pip install 'mmattn[{extra}]'"]
        for extra, text in data["extras"].items()
    ]
    return common.rows_as_text(["part", "state"], rows)
