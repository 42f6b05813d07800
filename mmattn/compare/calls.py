"""Moved."""

from mmattn.calls import *  # noqa: F403
