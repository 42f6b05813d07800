"""Moved."""

from mmattn.variants import *  # noqa: F403
