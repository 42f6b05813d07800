"""Write the pages of the methods: ``python docs/build.py [NAME ...] [--figures]``.

A page is made of the class (first line, idea, arguments, where it attaches) and of its note,
``docs/methods/_notes/<name>.md``: TOML between two ``+++`` lines, then Markdown. Without ``--figures`` only
missing figures are drawn.

Keys of a note:
    model: embedded model of the examples, or empty when `code` brings its own.
    use: the method as Python writes it, ``VMoBA(topk=0.25)``.
    cli: a command.
    code: replaces the generated Python example, where attaching alone is not how the method is used.
    figure: a kind of figure, see ``docs/methods/_figures``.
    caption: what the figure shows.
    attaches: a sentence about sites that the class does not tell.
    related: names of other methods.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

from mmattn.registry import BUILTIN, method_class

HERE = Path(__file__).resolve().parent / "methods"
HEADS = ("Args", "Shapes", "Raises", "Cost")
HOSTS = {
    "diffusers": "diffusers",
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "torch": "any `nn.Module` that calls scaled-dot-product attention",
}
NEEDS = {
    "grid": "the token grid of the call",
    "clock": "a step clock (attach to the pipeline, or call `session.step(i, n)`)",
    "image_tokens": "to know which tokens of the prompt are the image's",
    "pixels": "the pixels of the picture",
}
VLM = """
from PIL import Image

import mmattn
from mmattn.calls import answer
from mmattn.loading import resolve

vlm = resolve("vlm")
picture = Image.open("docs/methods/scene.png")
method = mmattn.{use}
with mmattn.attach(vlm.target, method) as session:
    print(answer(vlm, [picture], ["describe the picture ."])[0])
print(session.report())
"""
VIT = """
from PIL import Image

import mmattn
from mmattn.calls import labels_of, logits, preprocess
from mmattn.loading import resolve

vit = resolve("vit")
pixels = preprocess(vit, [Image.open("docs/methods/shape.png")])
method = mmattn.{use}
with mmattn.attach(vit.target, method) as session:
    print(labels_of(vit)[int(logits(vit, pixels)[0].argmax())])
print(session.report())
"""
DRAW = """
import mmattn
from mmattn.calls import draw
from mmattn.loading import resolve

pipe = resolve("{model}")
prompt = "{prompt}"
method = mmattn.{use}
with mmattn.attach(pipe.target, method) as session:
    drawn = draw(pipe, [prompt], seeds=[0], steps=8)
print(session.report())
"""
PROMPTS = {
    "t2i": "a red circle left of a blue square on a white background",
    "t2v": "a red circle moving right on a white background",
}


class Note(NamedTuple):
    """The hand-written part of a page."""

    use: str
    cli: str
    figure: str
    caption: str
    related: list[str]
    text: str
    model: str = ""
    code: str = ""
    attaches: str = ""


def note(name: str) -> Note:
    """Read the note of a method; links in it are relative to the note's own folder."""
    path = HERE / "_notes" / f"{name}.md"
    if not path.is_file():
        raise SystemExit(
            f"{name} has no note: write {path.relative_to(HERE.parent.parent)} (docs/build.py says how)"
        )
    _, head, text = path.read_text(encoding="utf-8").split("+++\n", 2)
    table: dict[str, Any] = tomllib.loads(head)
    own = {k: _moved(v) if isinstance(v, str) else v for k, v in table.items()}
    return Note(text=_moved(text).strip(), **own)


def _moved(text: str) -> str:
    """Links of a note as its page needs them, one folder up."""
    return re.sub(r"\]\(\.\./(?=\w|\.\./)", "](", text)


def sections(doc: str) -> dict[str, str]:
    """A docstring by section; the text before the first one is ``""``."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(doc).splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in HEADS:
            current = head
            found[current] = [rest.strip()] if rest.strip() else []
        elif (
            current
            and line
            and not line.startswith(" ")
            and (found[current][-1:] or [""])[-1] == ""
        ):
            current = ""  # prose after a section, as in "Cost" or a last remark
            found[""] += ["", line]
        else:
            found[current].append(line)
    return {k: dedent("\n".join(v)).strip() for k, v in found.items()}


def markdown(text: str) -> str:
    """Double backticks to single ones, outside of which angle brackets and stars stay as they are."""
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.S)


def arguments(cls: type[Any], text: str) -> list[str]:
    """One bullet per argument, with type and default from the class."""
    known = {f.name: f for f in fields(cls)}
    bullets: list[str] = []
    for line in text.splitlines():
        match = re.match(r"([a-z_0-9, ]+): (.*)", line)
        names = [] if match is None else [n.strip() for n in match[1].split(",")]
        if match is not None and all(n in known for n in names):
            each = [f"`{n}` ({known[n].type}, default `{known[n].default!r}`)" for n in names]
            bullets.append(f"- {', '.join(each)}: {match[2]}")
        elif bullets:
            bullets[-1] += f"\n  {line.strip()}"
    return bullets


def example(n: Note) -> str:
    """The Python example of a page."""
    template = {"vlm": VLM, "vit": VIT}.get(n.model, DRAW)
    code = n.code or template.format(use=n.use, model=n.model, prompt=PROMPTS.get(n.model, ""))
    return code.strip()


def attaches(cls: type[Any], n: Note) -> str:
    """Seams, kinds and hosts as sentences."""
    lines = [
        f"- Seams: {', '.join(cls.seams)}.",
        f"- Sites: {', '.join(cls.kinds)} attention."
        if cls.kinds
        else "- Sites: none; it acts between the vision tower and the language model.",
        f"- Hosts: {', '.join(HOSTS[h] for h in cls.hosts)}.",
    ]
    if cls.needs:
        lines.append(f"- Needs {'; '.join(NEEDS[need] for need in sorted(cls.needs))}.")
    if "attention" in cls.seams and not cls.observes:
        honours = [
            w for w, on in (("mask tensors", cls.masks), ("causal attention", cls.causal)) if on
        ]
        lines.append(f"- Honours {' and '.join(honours) or 'neither masks nor causal attention'}.")
    if cls.observes:
        lines.append(
            "- Leaves the result of the attention itself alone, so it goes with any other method."
        )
    if n.attaches:
        lines.append(f"- {n.attaches}")
    model = n.model or "t2i"
    lines.append(
        f"\nWhat it would do to your model, site by site: `mmattn plan {model} -m {cls.name}`."
    )
    return "\n".join(lines)


def page(name: str) -> str:
    """The whole page of a method."""
    cls, n = method_class(name), note(name)
    doc = sections(cls.__doc__ or "")
    first, _, idea = doc[""].partition("\n")
    related = [f"[`{method_class(r).__name__}`]({r}.md)" for r in n.related]
    parts = [
        f"# {cls.__name__} (`{name}`)",
        f"<!-- Written by docs/build.py from the class and _notes/{name}.md; edit those. -->",
        markdown(first),
        f"![{cls.__name__} at work](figures/{name}.png)",
        n.caption,
        f"Paper: {cls.paper}." if cls.paper != "none" else "",
        "## Try it",
        "From the root of the repository, on a model that is part of it:",
        f"```python\n{example(n)}\n```",
        f"```sh\n{n.cli.strip()}\n```",
        n.text,
        "## Idea" if idea.strip() else "",
        markdown(idea.strip()),
        "## Arguments" if doc.get("Args") else "",
        markdown("\n".join(arguments(cls, doc.get("Args", "")))),
        "## Where it attaches",
        attaches(cls, n),
    ]
    for head, title in (("Shapes", "Shapes"), ("Raises", "Errors"), ("Cost", "Cost")):
        if doc.get(head):
            body = doc[head]
            if head == "Raises":
                body = re.sub(r"^(\w+): ", r"- `\1`: ", body, flags=re.M)
                body = re.sub(r"^ +", "  ", body, flags=re.M)
            parts += [f"## {title}", markdown(body)]
    parts += ["## Related", f"{', '.join(related)}. All methods: [methods.md](../methods.md)."]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(name: str) -> Path:
    """Draw the figure of a method with the method itself."""
    from methods._figures import KINDS, inputs  # a folder beside this script

    n = note(name)
    path = HERE / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    if not (HERE / "scene.png").is_file():
        inputs(HERE)
    KINDS[n.figure](n.use, path)
    return path


def main() -> None:
    """Write the pages that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods; all by default")
    parser.add_argument("--figures", action="store_true", help="draw figures that exist, too")
    asked = parser.parse_args()
    for name in asked.names or sorted(BUILTIN):
        path = HERE / f"{name}.md"
        path.write_text(page(name), encoding="utf-8")
        drawn = HERE / "figures" / f"{name}.png"
        if asked.figures or not drawn.is_file():
            figure(name)
        sys.stderr.write(f"{name}: {path.name}, {drawn.stat().st_size // 1024} KB figure\n")


if __name__ == "__main__":
    main()
