"""Gradio demos, each with ``build() -> gr.Blocks``. The first ones arrive in the next release."""
