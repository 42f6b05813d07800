# ruff: noqa: T201
# %% [markdown]
# # Your own method
#
# A method is one frozen dataclass: knobs as fields, pure functions for the seams. Written once, it runs on
# every host it claims. This one keeps, for every query, the keys with the highest scores, and nothing else.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch

import mmattn
from mmattn.calls import draw, logits
from mmattn.evals.quality import psnr
from mmattn.loading import resolve
from mmattn.mini.train_vit import draw_batch


@mmattn.register("top-keys")
@dataclass(frozen=True)
class TopKeys(mmattn.Method):
    """Lets every query see its best keys only.

    Args:
        share: share of the keys that a query keeps, in (0, 1]; 1 is dense attention.
    """

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    hosts: ClassVar[tuple[str, ...]] = ("diffusers", "timm", "torch")

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise mmattn.ConfigError(f"share must lie in (0, 1], got {self.share}")

    @property
    def passive(self) -> bool:
        """With all keys nothing is done, so that the output is bitwise the untouched one."""
        return self.share == 1

    def attend(self, q, k, v, *, mask, scale, site, dense):  # q [B, H, Q, D], k and v [B, H, K, D]
        if self.passive:
            return dense(q, k, v)
        keep = max(1, round(self.share * k.shape[2]))
        scores = q @ k.transpose(-1, -2)
        seen = torch.zeros_like(scores, dtype=torch.bool)
        seen.scatter_(-1, scores.topk(keep, dim=-1).indices, True)
        site.note("density", keep / k.shape[2])  # shows up in the report
        return dense(q, k, v, mask=seen)  # the host's own attention, with a mask


# %% [markdown]
# ## On a classifier
#
# Fewer keys, the same answers? And is it the choice, or would any keys do? The control uses as many keys,
# drawn at random from a generator that belongs to the site, never from the global one.


# %%
@mmattn.register("some-keys")
@dataclass(frozen=True)
class SomeKeys(TopKeys):
    """Lets every query see keys drawn at random: the control of `TopKeys`."""

    def attend(self, q, k, v, *, mask, scale, site, dense):
        keep = max(1, round(self.share * k.shape[2]))
        drawn = torch.rand(q.shape[1:3] + k.shape[2:3], generator=site.generator())
        seen = torch.zeros_like(drawn, dtype=torch.bool)
        seen.scatter_(-1, drawn.topk(keep, dim=-1).indices, True)
        site.note("density", keep / k.shape[2])
        return dense(q, k, v, mask=seen[None].to(q.device))


vit = resolve("vit")
pictures, truth = draw_batch(128, torch.Generator().manual_seed(900_000))
pixels = pictures * 2 - 1


def accuracy() -> float:
    return float((logits(vit, pixels).argmax(1) == truth).float().mean())


results = {"untouched": accuracy()}
for method in (TopKeys(share=0.25), SomeKeys(share=0.25)):
    with mmattn.attach(vit.target, method) as session:
        results[method.name] = accuracy()
for name, value in results.items():
    print(f"{name:10} {100 * value:5.1f} % right")
print(session.report())

# %% [markdown]
# On this classifier the best quarter of the keys is not better than any quarter. Without the control one
# would have reported a share of 25 % and an accuracy, and called the difference its cost.
#
# ## The same class on a video pipeline
#
# It is registered, so a name and a recipe will do as well.

# %%
pipe = resolve("t2v")
prompt = ["a red circle moving right on a white background"]
dense = draw(pipe, prompt, [0], steps=4)
with mmattn.attach(pipe.target, {"name": "top-keys", "share": 0.25}) as on_video:
    changed = draw(pipe, prompt, [0], steps=4)
with mmattn.attach(pipe.target, SomeKeys(share=0.25)):
    chance = draw(pipe, prompt, [0], steps=4)
with mmattn.attach(pipe.target, TopKeys(share=1)):
    same = draw(pipe, prompt, [0], steps=4)
decibel = {
    "top-keys": float(psnr(changed, dense).mean()),
    "some-keys": float(psnr(chance, dense).mean()),
}
for name, value in decibel.items():
    print(f"{name:10} {value:5.1f} dB against dense")
print(on_video.report())

# %% [markdown]
# ## What a test should hold
#
# Identity settings change nothing, other settings do; the work was done (density below one); better than
# random at equal budget; rows of a batch do not see each other. CONTRIBUTING.md lists what a method of
# this repository needs besides.

# %%
assert torch.equal(same, dense)
assert not torch.equal(changed, dense)
assert on_video.stats.density < 0.3
with mmattn.attach(vit.target, TopKeys(share=0.25)):
    rows = logits(vit, pixels[:3])
    alone = logits(vit, pixels[:1])
assert torch.allclose(rows[:1], alone, atol=1e-4)
