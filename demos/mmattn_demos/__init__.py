"""Gradio demos on the embedded models or on yours: ``mmattn demo``, or one alone, ``mmattn demo image``.

Every module that is a demo has ``build() -> gr.Blocks`` and runs as ``python -m mmattn_demos.<name>``.
"""
