"""Pipelines on diffusers models: sparse Wan, long SANA-Video, image sets and their LoRAs, chats, guidance.

Importing this package imports none of its modules.
"""
