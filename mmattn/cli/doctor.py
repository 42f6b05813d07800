"""``mmattn doctor``: what is installed, which back ends can run here, and why the others cannot."""

from __future__ import annotations

import platform
from typing import Any

import typer

from mmattn.cli import common
from mmattn.cli.common import Config, Json, emit, emit_json, guarded

EXTRAS = {
    "clip": "open_clip_torch",
    "demo": "gradio",
    "xformers": "xformers",
    "train": "peft",
    "ray": "ray",
    "batch": "pyarrow",
    "eval": "torchmetrics",
}
"""The extras of the package and the distribution that shows whether one is there."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("doctor")(doctor)


@guarded
def doctor(as_json: Json = False, config: Config = None) -> None:
    """Check this installation: libraries, devices, back ends and why not, models, video encoder."""
    from dataclasses import asdict

    from mmattn import __version__
    from mmattn.batch.writers import video_encoder
    from mmattn.measuring import package_versions
    from mmattn.mini import manifest

    checks = [manifest.check(name) for name in manifest.NAMES]
    data = {
        "mmattn": __version__,
        "python": platform.python_version(),
        "versions": package_versions(),
        "devices": _devices(),
        "backends": backends(),
        "embedded": [{**asdict(check), "ok": check.ok} for check in checks],
        "video_encoder": video_encoder() or "animated WebP",
        "extras": _extras(),
    }
    if as_json:
        emit_json(data)
    else:
        emit(_text(data))
    if not all(check.ok for check in checks):
        raise typer.Exit(common.SOME_FAILED)


def backends() -> dict[str, dict[str, Any]]:
    """For every op of the kernels: what ``backend="auto"`` runs here, and why others cannot.

    Asked with half-precision tensors of head dimension 64 on the first GPU, or in float32 on the CPU.
    """
    import mmattn_kernels  # noqa: F401  (fills the registry)
    import torch
    from mmattn_kernels._backends import REGISTRY, Problem

    on_gpu = torch.cuda.is_available()
    problem = Problem(
        torch.device("cuda" if on_gpu else "cpu"),
        torch.float16 if on_gpu else torch.float32,
        *(64, 64, 8, 8, 1024, 1024),
        {"groups": 2, "grid": (32, 32), "window": (7, 7), "patterns": False},
    )
    return {
        name: {"auto": op.choose("auto", problem).name, "reasons": op.explain(problem)}
        for name, op in sorted(REGISTRY.items())
    }


def _devices() -> list[str]:
    import torch

    devices = [f"cpu, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    return devices


def _extras() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for extra, package in EXTRAS.items():
        try:
            found[extra] = f"{package} {version(package)}"
        except PackageNotFoundError:
            found[extra] = None
    return found


def _text(data: dict[str, Any]) -> str:
    rows = [["mmattn", data["mmattn"]], ["python", data["python"]]]
    rows += [[name, text or "missing"] for name, text in data["versions"].items()]
    rows += [["device", text] for text in data["devices"]]
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
    ops = [
        [op, name, "runs" + (", chosen by auto" if name == found["auto"] else "")]
        if reason is None
        else [op, name, f"cannot run: {reason}"]
        for op, found in data["backends"].items()
        for name, reason in found["reasons"].items()
    ]
    parts = common.rows_as_text(["part", "state"], rows)
    return parts + "\n\n" + common.rows_as_text(["op", "back end", "here"], ops)
