"""Damaged configuration files, recipes and method tables: settings or a sentence."""

from __future__ import annotations

import json
import random

import mutator
import pytest
import trials
from typer.testing import CliRunner

import mmattn
from mmattn.cli import app
from mmattn.cli.common import columns, read_config
from mmattn.errors import MmattnError
from mmattn.methods.base import Method
from mmattn.registry import method_class, method_from, names
from mmattn.variants import label_of

TOML = [
    b"""steps = 4
guidance = 2.5
[batch]
width = 64
allow-extra = true
[[method]]
name = "tome"
r = 4
[[method]]
name = "vmoba"
threshold = 0.25
chunks = [2, 4, 4]
""",
    b'seed = 3\nmethod = ["tome:r=4", "vhr"]\nout = "x"\n[generate]\nsteps = 2\n',
]
RECIPE = [
    b"""sites = "*.blocks.*"
unsupported = "dense"
seed = 3
[[method]]
name = "tome"
r = 4
[[method]]
name = "neighborhood"
window = [3, 8, 8]
sites = ["*.[0-3].*", "x"]
"""
]
TABLES = [
    {"steps": 4, "guidance": 2.5, "batch": {"width": 64}, "method": [{"name": "tome", "r": 4}]},
    {"seed": 1, "method": ["tome:r=4"], "quiet": True, "model": ["t2i", "t2v"]},
    {"method": [{"name": "tome", "r": 4, "sites": "*"}], "seed": 3, "unsupported": "dense"},
    {"methods": [{"name": "vmoba"}, {"name": "neighborhood", "window": [3, 8, 8]}], "sites": ["*"]},
]
"""The same as JSON: two for the command line, two recipes."""

YAML = (
    b"steps: 4\nmethod:\n  - name: tome\n  - &a [*a, *a]\nx: !!python/object/apply:os.system [ls]\n"
)
KNOWN = {
    "batch": {"steps", "guidance", "width", "seed", "allow_extra", "method", "out", "config"}
    | {"quiet", "model"},
    "generate": {"steps", "guidance", "seed", "method"},
}


def cases(kind, count, folder):
    """Damaged settings; `kind` is the ending of their file, or "recipe" for TOML and JSON recipes."""
    for number in range(count):
        dice = random.Random(f"{kind} {number}")
        if kind in ("json", "recipe") and (kind == "json" or dice.random() < 0.5):
            tables = TABLES[2:] if kind == "recipe" else TABLES
            table, seeds = dice.choice(tables), [json.dumps(t).encode() for t in tables]
            if dice.random() < 0.7:
                data = json.dumps(mutator.mutate_table(table, dice)).encode()
            else:
                data = mutator.mutate(dice.choice(seeds), seeds, dice)
            path = folder / "x.json"
        else:
            seeds = {"toml": TOML, "recipe": RECIPE, "yaml": [YAML]}[kind]
            data = mutator.mutate(dice.choice(seeds), seeds, dice)
            path = folder / ("x.yaml" if kind == "yaml" else "x.toml")
        path.write_bytes(data)
        yield f"{kind} {number}", path


@pytest.mark.parametrize("kind", ["toml", "json", "yaml"])
def test_damaged_configuration_files(kind, tmp_path):
    def read(path):
        settings = read_config(path, "batch", KNOWN)
        assert set(settings) <= KNOWN["batch"] - {"config"}

    found = trials.run(cases(kind, trials.share(100), tmp_path), read)
    # No YAML is read; a piece of a file without any letter can still be TOML.
    assert found.refused > 20 and (found.read > 2 or kind == "yaml"), found


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_damaged_configuration_files_on_the_command_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def read(path):
        result = runner.invoke(app, ["batch", "jobs.txt", "--print-config", "--config", str(path)])
        if result.exit_code not in (0, 2):
            raise result.exception
        if result.exit_code:
            raise MmattnError(result.output)

    found = trials.run(cases(kind, trials.share(25), tmp_path), read)
    assert found.read and found.refused, found


WORDS = (
    "tome:r=4",
    "vmoba:threshold=0.3,chunks=[2,4,4]",
    "hiprune:keep=16+vhr",
    '{"name": "tome"}',
)


def test_damaged_methods_of_the_command_line():
    """What stands behind -m, and in the method cell of a row."""

    def texts():
        seeds = [word.encode() for word in WORDS]
        for number in range(trials.share(200)):
            dice = random.Random(f"words {number}")
            data = mutator.mutate(dice.choice(seeds), seeds, dice)
            yield f"words {number}", data.decode("utf-8", "replace")

    found = trials.run(texts(), lambda text: columns([text], None))
    assert found.read and found.refused, found


def test_damaged_recipes(tmp_path):
    def read(path):
        recipe = mmattn.load(path)
        assert recipe.methods and label_of(recipe.methods)

    found = trials.run(cases("recipe", trials.share(200), tmp_path), read)
    assert found.read and found.refused, found


def test_odd_method_tables():
    """Every method, with one setting of another type or size."""
    known = names()

    def tables():
        for number in range(trials.share(200)):
            dice = random.Random(f"method {number}")
            table = _defaults(method_class(known[number % len(known)]))
            changed = mutator.mutate_table(table, dice)
            yield f"method {number} {str(changed)[:120]}", changed

    def build(table):
        if not isinstance(table, dict):
            return
        method = method_from(table)
        assert isinstance(method, Method) and label_of([method])

    found = trials.run(tables(), build)
    assert found.read and found.refused, found


def _defaults(cls):
    try:
        return json.loads(json.dumps(cls().to_dict()))
    except (MmattnError, TypeError):
        return {"name": cls.name}
