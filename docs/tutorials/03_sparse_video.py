# ruff: noqa: T201
# %% [markdown]
# # Sparse attention for video
#
# A clip has many tokens and each attends to all. Sparse methods compute some of the pairs. How much is lost
# depends on which pairs, in which steps, on which model: measure all three.

# %%
import mmattn
from mmattn.calls import draw
from mmattn.evals.quality import psnr
from mmattn.loading import resolve

pipe = resolve("t2v")  # a stock WanPipeline of 5 MB
PROMPT = "a red circle moving right on a white background"
STEPS = 8


def clip():
    """One clip ``[3, T, Y, X]`` from the same noise every time."""
    return draw(pipe, [PROMPT], [0], steps=STEPS)[0]


dense = clip()
print("a clip of", list(dense.shape))

# %% [markdown]
# ## Density and recall
#
# `probe` names steps in which the session also runs the dense attention, to say how much of its mass fell on
# what the method kept. It costs one dense pass per site in those steps.

# %%
method = mmattn.VMoBA(topk=0.25, dense_steps=0)
with mmattn.attach(pipe.target, method, probe=[1, 6]) as session:
    sparse = clip()
print(session.report())
quality = {"vmoba": float(psnr(sparse[None], dense[None]).mean())}

# %% [markdown]
# ## Dense first steps
#
# Early steps decide what is drawn. With the first quarter of the steps dense the same method loses much less.
# The step clock comes from the pipeline's scheduler; for a loop of your own call `session.step(i, n)`.

# %%
with mmattn.attach(pipe.target, mmattn.VMoBA(topk=0.25, dense_steps=0.25)):
    quality["vmoba, first quarter dense"] = float(psnr(clip()[None], dense[None]).mean())

# %% [markdown]
# ## Against chance
#
# Random blocks at the same density are the baseline. One clip is an anecdote; docs/video.md has 48 captions
# per setting with intervals.

# %%
density = session.stats.density
with mmattn.attach(pipe.target, mmattn.RandomBlocks(density=density, block=9)):
    quality["random blocks"] = float(psnr(clip()[None], dense[None]).mean())
print(f"density {density:.2f}")
for name, decibel in quality.items():
    print(f"{name:28} {decibel:5.1f} dB")

# %% [markdown]
# ## Some layers only
#
# `at` places a method; what is not placed anywhere stays dense.

# %%
placed = mmattn.VMoBA(topk=0.25, dense_steps=0).at("*.blocks.[3-5].attn1")
with mmattn.attach(pipe.target, [placed]) as half:
    quality["last three blocks"] = float(psnr(clip()[None], dense[None]).mean())
print(f"last three blocks            {quality['last three blocks']:5.1f} dB")
