"""Start a demo: loopback by default, a private folder for its files, bounded queue and uploads."""

from __future__ import annotations

import atexit
import ipaddress
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import mmattn
from mmattn.errors import ConfigError, MissingExtraError
from mmattn_demos.guarding import Guard
from mmattn_demos.limits import UPLOAD_BYTES
from mmattn_demos.style import CSS

QUEUE = 16
SESSIONS = 64
"""Visitors whose page and unread results are kept; beyond them the longest silent are forgotten."""
MESSAGES = 256
"""Unread ones that are kept of a visitor; the oldest go first, and they tell progress."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""How pages and clients name their session."""
_OLDEST = (6, 31)
"""Versions before 6.7 have path traversals that later ones closed; the bounds below are made for the queue
of 6.31."""


def gradio() -> Any:
    """The gradio module, with analytics off.

    Raises:
        MissingExtraError: when it is not installed.
        ConfigError: when it is too old to be put on a network.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingExtraError("mmattn demo", "gradio", "demo") from error
    found = tuple(int(part) for part in gr.__version__.split(".")[:2])
    if found < _OLDEST:
        raise ConfigError(
            f"gradio {gr.__version__} is too old to be served safely; install gradio>=6.31: "
            "pip install 'mmattn[demo]'"
        )
    return gr


def private_folder() -> Path:
    """Where uploads and results lie: readable by the owner alone, removed at exit.

    Raises:
        ConfigError: when GRADIO_TEMP_DIR names a folder that others can read.
    """
    named = os.environ.get("GRADIO_TEMP_DIR")
    if named is None:
        folder = Path(tempfile.mkdtemp(prefix="mmattn-demo-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        return folder
    folder = Path(named)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise ConfigError(
            f"GRADIO_TEMP_DIR={named} can be read by others; chmod 700 it, or unset the variable"
        )
    return folder


def loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def credentials(text: str | None, host: str) -> tuple[str, str] | None:
    """User and password from ``user:password``.

    Raises:
        ConfigError: for another form, and when `host` can be reached from other machines without them.
    """
    if not text:
        if not loopback(host):
            raise ConfigError(
                f"{host} can be reached from other machines, so the demo wants a password: --auth "
                "user:password (or MMATTN_AUTH), or leave --host at 127.0.0.1"
            )
        return None
    user, colon, password = text.partition(":")
    if not colon or not user or len(password) < 8:
        raise ConfigError(
            "--auth is written user:password, with a password of 8 characters or more"
        )
    return user, password


def theme(gr: Any) -> Any:
    """System fonts only: nothing is fetched from elsewhere."""
    made = gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    return made.set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_background_fill="*background_fill_secondary",
        block_label_background_fill_dark="*background_fill_secondary",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
    )


def blocked() -> list[str]:
    """Folders whose files are never served, whatever else is allowed."""
    places = [Path.cwd(), Path.home(), Path(mmattn.__file__).parent]
    return [str(place.resolve()) for place in places if place.resolve() != Path("/")]


def _forgiving(queue: Any) -> None:
    """Drop messages to visitors who have left, and the oldest of visitors who do not read.

    Gradio's worker looks a waiting request's session up without asking whether it is still there, and ends
    with a KeyError if not; from then on every request is refused.
    """
    send = queue.send_message

    def send_if_there(event: Any, message: Any) -> None:
        unread = queue.pending_messages_per_session.get(event.session_hash)
        if unread is None:
            return
        send(event, message)
        while unread.qsize() > MESSAGES:
            dropped = unread.get_nowait()
            if dropped.msg == "process_completed":
                ids = queue.pending_event_ids_session.get(event.session_hash, set())
                ids.discard(dropped.event_id)

    queue.send_message = send_if_there


def _forgetful(queue: Any) -> None:
    """Bound what stays in memory of requests that have ended.

    By itself Gradio records 10 000 requests for a monitoring page that is off here, and makes a table of
    them after every request. One session name that is no text fails that table, and from then on every
    request stays in memory with its body. It also keeps half a megabyte of page state per session, of
    anonymous calls too, and the results that 2000 visitors have not read.
    """
    queue.ANALYTICS_MAX_EVENTS = 0
    push, reset = queue.push, queue.reset_iterators

    async def push_and_forget(body: Any, request: Any, username: Any) -> Any:
        if body.session_hash is not None and not _NAME.fullmatch(body.session_hash):
            return False, "A session is named with 1 to 64 letters, digits, - and _.", "error"
        answer = await push(body=body, request=request, username=username)
        if answer[0]:
            queue.pending_messages_per_session.move_to_end(body.session_hash)
            _forget_silent(queue)
        return answer

    async def reset_and_forget(event: str) -> None:
        await reset(event)
        # The session of an anonymous call has the name of its only event, which ends here.
        queue.server_app.state_holder.session_data.pop(event, None)
        queue.server_app.state_holder.time_last_used.pop(event, None)

    queue.push, queue.reset_iterators = push_and_forget, reset_and_forget


def _forget_silent(queue: Any) -> None:
    """Drop unread results of visitors for whom nothing waits or runs, but for the last `SESSIONS`."""
    unread, ids = queue.pending_messages_per_session, queue.pending_event_ids_session
    waiting = [line.queue for line in queue.event_queue_per_concurrency_id.values()]
    running = [events for events in queue.active_jobs if events is not None]
    busy = {event.session_hash for events in (*waiting, *running) for event in events}
    for name in [name for name in unread if name not in busy][:-SESSIONS]:
        del unread[name]
    for name in [name for name in ids if name not in unread and name not in busy]:
        del ids[name]


def serve(
    demo: Any,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: str | None = None,
    wait: bool = True,
) -> str:
    """Start `demo` and return its address.

    Args:
        demo: blocks that `build` made.
        host: address to listen at.
        port: None takes the first free one from 7860.
        auth: ``user:password``; needed when `host` is not loopback.
        wait: False returns while the server runs.

    Raises:
        ConfigError: see `credentials`, or when the port is taken.
    """
    gr = gradio()
    from starlette.middleware import Middleware

    known = credentials(auth, host)
    demo.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
    _forgiving(demo._queue)
    _forgetful(demo._queue)
    try:
        _, address, _ = demo.launch(
            server_name=host,
            server_port=port,
            auth=known,
            share=False,
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            max_threads=8,
            max_file_size=UPLOAD_BYTES,
            blocked_paths=blocked(),
            enable_monitoring=False,
            strict_cors=True,
            state_session_capacity=SESSIONS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            app_kwargs={
                "middleware": [Middleware(Guard)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
            theme=theme(gr),
            head=f"<style>{CSS}</style>",  # rules inside @media survive only here
        )
    except OSError as error:
        place = "a port from 7860 on" if port is None else f"port {port}"
        raise ConfigError(
            f"{place} at {host} cannot be opened; name another: --port 7999"
        ) from error
    if wait:
        demo.block_thread()
    return str(address)
