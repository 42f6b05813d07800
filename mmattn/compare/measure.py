"""Moved."""

from mmattn.measuring import *  # noqa: F403
