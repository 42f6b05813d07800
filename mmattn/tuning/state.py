"""What a tuning run has found so far, on disk, so that it can be stopped and continued."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmattn.errors import ConfigError


class State:
    """Results by name, in one JSON file that is replaced whole after every result.

    Args:
        path: the file.
        settings: everything that results depend on; results of other settings are never used.

    Raises:
        ConfigError: when the file holds results of other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.results: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            key, self.results = found["key"], found["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a tuning record: {error}; delete it") from error
        if key != self.key:
            raise ConfigError(
                f"{path} holds results of other settings (model, prompts, candidates, steps, size or "
                "seed). Delete it to start over, or write to another recipe."
            )

    def save(self, name: str, value: Any) -> None:
        """Add one result and write the file."""
        self.results[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".part")
        fresh.write_text(
            json.dumps({"key": self.key, "results": self.results}) + "\n", encoding="utf-8"
        )
        os.replace(fresh, self.path)
