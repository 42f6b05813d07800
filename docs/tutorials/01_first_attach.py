# ruff: noqa: T201
# %% [markdown]
# # First attach
#
# Attach a method to a model you have, look at what it did, and take it off again. The model here is the
# embedded classifier, a stock timm vision transformer of 1.7 MB; nothing is downloaded.

# %%
import torch

import mmattn
from mmattn.calls import labels_of, logits
from mmattn.loading import resolve
from mmattn.mini.train_vit import draw_batch

vit = resolve("vit")
pictures, truth = draw_batch(64, torch.Generator().manual_seed(900_000))
pixels = pictures * 2 - 1  # this model was trained on values from -1 to 1
before = logits(vit, pixels)
accuracy = float((before.argmax(1) == truth).float().mean())
print(
    f"untouched: {100 * accuracy:.0f} % right, for example {labels_of(vit)[int(before[0].argmax())]}"
)

# %% [markdown]
# ## Look before touching
#
# `plan` finds the attention modules and asks the method about each of them. It changes nothing. A method
# that does not fit says why, site by site.

# %%
method = mmattn.ToMe(r=8)  # merge the 8 most similar pairs of tokens after every block
print(mmattn.plan(vit.target, method))
refused = mmattn.plan(vit.target, "vhr")
print(refused)  # made for vision-language models: every row has its reason

# %% [markdown]
# ## Attach
#
# Inside `with` the model runs with the method. Outside it is the model you had, to the last bit.

# %%
with mmattn.attach(vit.target, method) as session:
    merged = logits(vit, pixels)
    with session.disabled():  # the untouched model, in the middle of a session
        untouched = logits(vit, pixels)
print(session.report())
after = logits(vit, pixels)

merged_accuracy = float((merged.argmax(1) == truth).float().mean())
print(f"with ToMe: {100 * merged_accuracy:.0f} % right")
print(f"changed by: {float((merged - before).abs().max()):.3f}")
print(f"left behind: {float((after - before).abs().max())}")

# %% [markdown]
# ## When something does not fit
#
# Nothing is skipped in silence. A method without any site, a selector that matches nothing, a call that the
# method cannot honour: each is an error with a sentence.

# %%
errors = []
for ask in (
    lambda: mmattn.attach(vit.target, "vhr"),
    lambda: mmattn.attach(vit.target, method, sites="layers.*"),
    lambda: mmattn.attach(vit.target, "tom"),
):
    try:
        ask()
    except mmattn.MmattnError as error:
        errors.append(error)
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
