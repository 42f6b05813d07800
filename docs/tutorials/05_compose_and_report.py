# ruff: noqa: T201
# %% [markdown]
# # Compose and report
#
# Several methods at once, what the session knows afterwards, and how to write it down so that somebody else
# can attach the same thing.

# %%
import json
import tempfile
from pathlib import Path

import torch

import mmattn
from mmattn.batch.writers import to_image
from mmattn.calls import answer
from mmattn.loading import resolve
from mmattn.mini import objects

folder = Path(tempfile.mkdtemp())
vlm = resolve("vlm")
scenes = objects.sample_scenes(6, torch.Generator().manual_seed(5), partner_prob=0.2)
pictures = [to_image(picture) for picture in objects.render(scenes)[0]]
asked = [objects.CAPTION_PROMPT] * len(pictures)

# %% [markdown]
# ## A recipe
#
# Methods and where they go, as TOML. `docs/recipes` has more.

# %%
(folder / "recipe.toml").write_text(
    """
[[method]]
name = "merge-prune"
keep = 32

[[method]]
name = "pai"
alpha = 0.2

[[method]]
name = "attention-maps"
sites = "*language_model*"
"""
)
recipe = mmattn.load(folder / "recipe.toml")
print(recipe)

# %% [markdown]
# ## The plan of a composition
#
# Each column of a site says who acts there. `AttentionMaps` only watches, so it may share a site.

# %%
plan = mmattn.plan(vlm.target, recipe)
print(plan)

# %%
with mmattn.attach(vlm.target, recipe) as session:
    captions = answer(vlm, pictures, asked, max_new_tokens=24)
    maps = mmattn.AttentionMaps.maps(session)
    files = mmattn.AttentionMaps.save(session, folder / "maps")
print(captions[0])
print(len(maps), "attention maps in", len(files), "files")

# %% [markdown]
# ## What happened
#
# `report` is for people, `stats` for programs, `save` for the record: methods with their settings, sites,
# versions and numbers. `load` reads the record back as a recipe.

# %%
print(session.report())
stats = session.stats
print(stats.executed, "of", stats.planned, "sites executed,", stats.calls, "calls")
session.save(folder / "run.json")
record = json.loads((folder / "run.json").read_text())
print(sorted(record))

with mmattn.attach(vlm.target, mmattn.load(folder / "run.json")):
    again = answer(vlm, pictures, asked, max_new_tokens=24)
assert again == captions
