"""Planners of `ChatDiT`: by rules, by a language model behind an HTTP endpoint, by a local one."""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from mmattn.errors import ConfigError
from mmattn_pipelines.chatdit_language import LanguagePlanner, Turn
from mmattn_pipelines.chatdit_plan import PlannerError
from mmattn_pipelines.chatdit_rules import RulePlanner

__all__ = ["OpenAIPlanner", "RulePlanner", "TransformersPlanner"]

_LONGEST = 2048


@dataclass(frozen=True)
class OpenAIPlanner(LanguagePlanner):
    """Plan with a language model behind an OpenAI-compatible chat-completions endpoint.

    Works with any server that speaks ``POST <base_url>/chat/completions``, local ones included. The key is
    read from the environment when a request is made, is kept nowhere, appears in no message of an error,
    and is sent neither over plain HTTP to another machine nor to where a server redirects. Pictures go
    along as JPEG, at most 2048 pixels long; transparent ones in RGB.

    Args:
        model: name of the model, as the server knows it.
        base_url: up to and without ``/chat/completions``.
        key_variable: environment variable that holds the key; None sends none.
        sees: whether the model takes pictures.
        timeout: seconds for one request, above 0.
        retries: further requests after a time-out, a lost connection or an answer 408, 429 or 5xx.
        backoff: seconds before the first of them; doubled for every further one.
        max_tokens: length of a reply.
        json_mode: ask the server for JSON; off for servers that do not know ``response_format``.
        extra: further fields of the request body, such as ``{"temperature": 0.2}``; they take the place of
            ours, and None leaves one out.
        attempts, describe: see `LanguagePlanner`.

    Raises:
        ConfigError: a `base_url` that is not http or https, or a number out of its range.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    sees: bool = True
    timeout: float = 120.0
    retries: int = 3
    backoff: float = 1.0
    max_tokens: int = 8192
    json_mode: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 5
    describe: Callable[[Image.Image], str] | None = None

    def __post_init__(self) -> None:
        """Check address and numbers."""
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"base_url must begin with http:// or https:// and a host, got {self.base_url!r}"
            )
        if self.timeout <= 0 or self.attempts < 1 or self.retries < 0 or self.backoff < 0:
            raise ConfigError(
                "timeout is above 0, attempts at least 1, retries and backoff at least 0; got "
                f"{self.timeout}, {self.attempts}, {self.retries}, {self.backoff}"
            )

    def complete(self, turns: Sequence[Turn], *, as_json: bool) -> str:
        """The server's reply; see `LanguagePlanner.complete`.

        Raises:
            PlannerError: no key; the server cannot be reached, refuses, or answers in another form.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_message(turn) for turn in turns],
            "max_tokens": self.max_tokens,
        }
        if as_json and self.json_mode:
            body["response_format"] = {"type": "json_object"}
        body = {k: v for k, v in {**body, **self.extra}.items() if v is not None}
        answer = self._post(json.dumps(body).encode())
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise PlannerError(
                f"{self._where} answered without choices[0].message.content: {answer[:120]!r}; is it an "
                "OpenAI-compatible endpoint?"
            ) from error
        return content if isinstance(content, str) else ""

    @property
    def _where(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def _post(self, body: bytes) -> str:
        key = self._key()
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._where, body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    return str(response.read().decode("utf-8", "replace"))
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace")
                problem = f"answered {error.code}: {' '.join(said.split())[:200]}"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem = f"did not answer in {self.timeout:g} s" if late else f"failed ({reason})"
        problem = problem.replace(key, "***") if key else problem
        raise PlannerError(f"{self._where} {problem} (request {attempt + 1})")

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise PlannerError(
                f"the environment variable {self.key_variable} holds no key for {self.base_url}; set it, "
                "or pass key_variable=None for a server that needs none"
            )
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise PlannerError(
                f"the key in {self.key_variable} would go to {self.base_url} unencrypted; use https, or "
                "pass key_variable=None"
            )
        return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: urllib would carry the key to the other host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _message(turn: Turn) -> dict[str, Any]:
    if not turn.images:
        return {"role": turn.role, "content": turn.text}
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image), "detail": "high"}}
        for image in turn.images
    ]
    return {"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]}


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


class TransformersPlanner(LanguagePlanner):
    """Plan with a chat model of transformers that is already loaded.

    The dialogue goes through the chat template. A processor with an image processor sees pictures; a
    tokenizer does not, and then descriptions of given pictures come from the caller or from `describe`.

    Args:
        model: what has ``generate``.
        processor: its tokenizer or processor.
        max_new_tokens: length of a reply in tokens, at least 1.
        generation: further arguments of ``generate``, such as a ``logits_processor`` that only lets JSON
            through; without any, decoding is greedy.
        attempts, describe: see `LanguagePlanner`.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 2048,
        generation: Mapping[str, Any] | None = None,
        attempts: int = 5,
        describe: Callable[[Image.Image], str] | None = None,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
            raise ConfigError(
                f"{type(processor).__name__} has no chat template; take a model that is tuned for chat"
            )
        if max_new_tokens < 1 or attempts < 1:
            raise ConfigError(
                f"max_new_tokens and attempts are at least 1, got {max_new_tokens} and {attempts}"
            )
        self.model, self.processor = model, processor
        self.sees = hasattr(processor, "image_processor")
        self.attempts, self.describe = attempts, describe
        self._arguments = {
            "do_sample": False,
            **(generation or {}),
            "max_new_tokens": max_new_tokens,
        }

    @torch.no_grad()
    def complete(self, turns: Sequence[Turn], *, as_json: bool) -> str:
        """The model's reply; see `LanguagePlanner.complete`.

        Raises:
            PlannerError: the dialogue and the longest reply do not fit into the model's context.
        """
        try:
            inputs = self._inputs(turns)
        except TemplateError:  # a template without a system role
            system, first, *rest = turns
            inputs = self._inputs([replace(first, text=f"{system.text}\n{first.text}"), *rest])
        length = inputs["input_ids"].shape[1]
        config = self.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and length + self._arguments["max_new_tokens"] > room:
            raise PlannerError(
                f"the question has {length} tokens and the reply may have "
                f"{self._arguments['max_new_tokens']}, {type(self.model).__name__} has room for {room}; "
                "lower max_new_tokens, or take a model with a longer context"
            )
        tokens = self.model.generate(**inputs, **self._arguments)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return str(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))

    def _inputs(self, turns: Sequence[Turn]) -> Any:
        inputs = self.processor.apply_chat_template(
            [{"role": turn.role, "content": self._content(turn)} for turn in turns],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        if self.sees:
            return inputs.to(self.model.device, self.model.dtype)
        return inputs.to(self.model.device)

    def _content(self, turn: Turn) -> Any:
        if not self.sees:
            return turn.text
        pictures = [{"type": "image", "image": image} for image in turn.images]
        return [*pictures, {"type": "text", "text": turn.text}]
