"""The main job: the same prompts and seeds through a model with and without a method, side by side.

Jobs (`pictures`, `clips`, `answers`, `classes`) know one embedded model each; `run` drives them, and
`page` turns what they found into one self-contained HTML file.
"""
