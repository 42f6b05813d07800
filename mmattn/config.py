"""Recipes: methods and where to attach them, as TOML or JSON that round-trips.

```toml
sites = "transformer_blocks.*"
unsupported = "dense"
[[method]]
name = "vmoba"
threshold = 0.25
[[method]]
name = "neighborhood"
window = [3, 8, 8]
sites = "*.blocks.[0-3].*"    # optional: this method at these sites only
```
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmattn.errors import ConfigError, suggest
from mmattn.methods.base import Method, Placed
from mmattn.registry import method_from

_KEYS = ("method", "methods", "sites", "unsupported", "seed")
_RECORD_ONLY = ("mmattn", "versions", "device", "stats", "host", "target")


@dataclass(frozen=True)
class Recipe:
    """What `mmattn.load` returns and `mmattn.attach` accepts in place of methods."""

    methods: tuple[Method | Placed, ...]
    sites: Any = None
    unsupported: str = "error"
    seed: int = 0

    def save(self, path: str | Path, *, comment: Sequence[str] = ()) -> Path:
        """Write the recipe as TOML that `load` reads back.

        Args:
            path: a file that ends in ``.toml``.
            comment: lines for the head of the file.

        Raises:
            ConfigError: when the path does not end in ``.toml``.
        """
        path = Path(path)
        if path.suffix != ".toml":
            raise ConfigError(f"a recipe is written as .toml, got {path.name}")
        lines = [f"# {text}" for text in comment]
        for key, default in (("sites", None), ("unsupported", "error"), ("seed", 0)):
            if getattr(self, key) != default:
                lines.append(f"{key} = {json.dumps(getattr(self, key))}")
        for entry in self.methods:
            lines += ["", "[[method]]"]
            for key, value in entry.to_dict().items():
                if value is not None:
                    lines.append(f"{key} = {json.dumps(value)}")
                elif not _none_by_default(entry, key):
                    raise ConfigError(
                        f"{entry.name}: {key}=None is not the default, and TOML has no None; keep this "
                        "recipe as JSON (session.save)"
                    )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


def load(path: str | Path) -> Recipe:
    """Read a recipe, or the record a session saved.

    Raises:
        ConfigError: when the file is missing, cannot be parsed, or has an unknown key or value.
    """
    path = Path(path)
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        if not path.is_file():
            raise ConfigError(f"there is no recipe file at {path}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    try:
        data = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a table of settings, found {type(data).__name__}")
    return recipe_from(data, source=str(path))


def recipe_from(data: dict[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from a mapping with `method` (list of tables), `sites`, `unsupported` and `seed`."""
    for key in data:
        if key not in _KEYS and key not in _RECORD_ONLY:
            raise ConfigError(f"{source}: unknown key {key!r}{suggest(key, _KEYS)} Known: {_KEYS}")
    tables = data.get("method", data.get("methods"))
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{source}: needs at least one [[method]] table with a name")
    sites = _sites(data, source)
    unsupported = data.get("unsupported", "error")
    if unsupported not in ("error", "dense"):
        raise ConfigError(f"{source}: unsupported must be 'error' or 'dense', got {unsupported!r}")
    seed = data.get("seed", 0)
    if not isinstance(seed, int):
        raise ConfigError(f"{source}: seed must be an integer, got {seed!r}")
    return Recipe(tuple(_method(table, source) for table in tables), sites, unsupported, seed)


def _none_by_default(entry: Method | Placed, key: str) -> bool:
    method = entry.method if isinstance(entry, Placed) else entry
    return any(f.name == key and f.default is None for f in fields(method))


def _method(table: Any, source: str) -> Method | Placed:
    if not isinstance(table, dict) or "sites" not in table:
        return method_from(table)
    method = method_from({k: v for k, v in table.items() if k != "sites"})
    return method.at(_sites(table, source))


def _sites(table: dict[str, Any], source: str) -> Any:
    sites = table.get("sites")
    ok = sites is None or isinstance(sites, str)
    ok = ok or (isinstance(sites, list) and all(isinstance(s, str) for s in sites))
    if not ok:
        raise ConfigError(f"{source}: sites must be a glob or a list of globs, got {sites!r}")
    return sites
