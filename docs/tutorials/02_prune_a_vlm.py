# ruff: noqa: T201
# %% [markdown]
# # Prune a vision-language model
#
# Most image tokens say little. Pruning methods drop some before the language model; the question is which.
# Here three of them, at one budget, on the embedded LLaVA and drawn scenes whose objects are known.

# %%
import torch

import mmattn
from mmattn.batch.writers import to_image
from mmattn.calls import answer
from mmattn.loading import resolve
from mmattn.mini import objects

vlm = resolve("vlm")
scenes = objects.sample_scenes(16, torch.Generator().manual_seed(5), partner_prob=0.2)
pictures = [to_image(picture) for picture in objects.render(scenes)[0]]


def describe() -> list[str]:
    """Captions by whatever is attached now."""
    return answer(vlm, pictures, [objects.CAPTION_PROMPT] * len(pictures), max_new_tokens=48)


def score(captions: list[str]) -> tuple[float, float]:
    """Share of the objects that are named, and share of the named that are not there."""
    told = [objects.mentioned(text) for text in captions]
    there = [scene.names for scene in scenes]
    named = sum(len(set(a) & set(b)) for a, b in zip(told, there, strict=True))
    wrong = sum(len([x for x in a if x not in b]) for a, b in zip(told, there, strict=True))
    return named / sum(map(len, there)), wrong / max(1, sum(map(len, told)))


# %% [markdown]
# ## One budget, three choices, and chance
#
# Always run `RandomPrune` beside a selection: a method is worth its name when it beats chance at the same
# budget. On a model this small, with 16 pictures, differences of a few points are noise;
# `mmattn eval chair -m hiprune:keep=21` asks properly, and docs/vlm.md has the result.

# %%
results = {"untouched": score(describe())}
kept = {}
for method in (
    mmattn.HiPrune(keep=21),
    mmattn.MergePrune(keep=21),
    mmattn.RandomPrune(keep=21),
):
    with mmattn.attach(vlm.target, method) as session:
        results[method.name] = score(describe())
        kept[method.name] = session.stats.sites[-1].tokens_kept
for name, (recall, invented) in results.items():
    print(f"{name:12} names {100 * recall:3.0f} % of the objects, {100 * invented:3.0f} % invented")
print(session.report())

# %% [markdown]
# ## Pruning and mitigation in one call
#
# Methods compose when they use different seams. VCD contrasts the logits with those for a noised picture, and
# prunes in that stream as well. Two methods that prune are a conflict, found before anything is touched.

# %%
with mmattn.attach(vlm.target, [mmattn.MergePrune(keep=21), mmattn.VCD()]) as both:
    composed = score(describe())
print(f"both         names {100 * composed[0]:3.0f} %, {100 * composed[1]:3.0f} % invented")
print(both.report())

conflict = None
try:
    mmattn.attach(vlm.target, [mmattn.HiPrune(keep=21), mmattn.MergePrune(keep=21)])
except mmattn.ConflictError as error:
    conflict = error
    print(f"ConflictError: {error}")
