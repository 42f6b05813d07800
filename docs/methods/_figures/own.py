"""Figures of methods that are like no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from methods._figures.probe import BLUE, Seen, bare, made, model, save, show, watched
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import mmattn
from mmattn.batch.writers import to_image
from mmattn.calls import draw, logits
from mmattn.methods._heatmap import render
from mmattn.methods._word_maps import word_places
from mmattn.methods.flashbias import factorise
from mmattn.mini.train_vit import HELD_OUT_SEED, draw_batch

PROMPT = "a red circle left of a blue square on a white background"
STEPS = 20


def shape() -> Image.Image:
    """One picture of the kind the embedded classifier knows."""
    return to_image(draw_batch(4, torch.Generator().manual_seed(HELD_OUT_SEED + 3))[0][0])


def _painted(picture: Tensor, groups: Tensor, side: int) -> Tensor:
    """Every patch in the mean colour of its group, with lines between groups. `groups` ``[side * side]``."""
    patch = picture.shape[-1] // side
    mean = F.avg_pool2d(picture[None], patch)[0].flatten(1)
    count = int(groups.max()) + 1
    total = torch.zeros(3, count).index_add_(1, groups, mean)
    size = torch.zeros(count).index_add_(0, groups, torch.ones(len(groups)))
    cells = (total / size.clamp_min(1))[:, groups].view(3, side, side)
    zoom = 12
    out = cells.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    g = groups.view(side, side)
    for y in range(side):
        for x in range(side):
            if x and g[y, x] != g[y, x - 1]:
                out[:, y * zoom : (y + 1) * zoom, x * zoom] = 0.25
            if y and g[y, x] != g[y - 1, x]:
                out[:, y * zoom, x * zoom : (x + 1) * zoom] = 0.25
    return out


def merged(use: str, path: Path) -> None:
    """A picture, and what its patches have merged into before every second block of the ViT."""
    method, vit = made(use), model("vit")
    base = type(method)
    found: dict[int, Tensor] = {}

    class Watched(base):  # type: ignore[misc, valid-type]
        def leave(self, x: Tensor, *, site: Any) -> Tensor:
            if "source" in site.shared:
                found[site.index] = site.shared["source"][0].clone()
            return base.leave(self, x, site=site)

    pictures, _ = draw_batch(4, torch.Generator().manual_seed(HELD_OUT_SEED + 3))
    copy = Watched(**{k: v for k, v in method.to_dict().items() if k != "name"})
    figure, axes = plt.subplots(2, 4, figsize=(5.6, 3.0), layout="constrained")
    for row, picture in enumerate(pictures[:2]):
        with mmattn.attach(vit.target, copy):
            logits(vit, picture[None] * 2 - 1)
        stages = [found[i] for i in sorted(found)]
        show(axes[row][0], picture, "picture")
        for axis, source in zip(axes[row][1:], (stages[1], stages[3], stages[-1]), strict=True):
            prefix = len(source) - int((len(source) - 1) ** 0.5) ** 2
            groups = source[prefix:].unique(return_inverse=True)[1]
            side = int(len(groups) ** 0.5)
            show(axis, _painted(picture, groups, side), f"{int(groups.max()) + 1} of {side * side}")
    save(figure, path)


def identity(use: str, path: Path) -> None:
    """Without, with, the difference; and how often each site was reached."""
    pipe = model("t2i")
    plain = draw(pipe, [PROMPT], [0], steps=8)[0]
    with mmattn.attach(pipe.target, made(use)) as session:
        same = draw(pipe, [PROMPT], [0], steps=8)[0]
        sites = [s for run in session.runs for s in run.sites]
        calls = [s.meter.calls for s in sites]
    figure, axes = plt.subplots(
        1, 4, figsize=(7.4, 1.8), width_ratios=[1, 1, 1, 1.6], layout="constrained"
    )
    show(axes[0], plain, "untouched")
    show(axes[1], same, "identity attached")
    show(axes[2], (plain - same).abs() * 255, f"difference: {float((plain - same).abs().max()):g}")
    places = range(len(calls) - 1, -1, -1)
    axes[3].barh(list(places), calls, color=BLUE)
    axes[3].set_yticks(
        list(places), [s.path.removeprefix("transformer.") for s in sites], fontsize=6
    )
    axes[3].set_title("calls of each site", pad=3)
    axes[3].spines[["top", "right"]].set_visible(False)
    save(figure, path)


def maps(use: str, path: Path) -> None:
    """Where in the picture the model reads each word."""
    pipe = model("t2i")
    words = ("red", "circle", "left", "blue", "square")
    places = word_places(pipe.target, PROMPT, words)
    method = mmattn.AttentionMaps(tokens=tuple(p[0] for p in places))
    with mmattn.attach(pipe.target, method) as session:
        picture = draw(pipe, [PROMPT], [0], steps=STEPS)[0]
        found = [m for m in method.maps(session) if m.branch == 0 and m.row == 0]
    figure, axes = plt.subplots(1, 6, figsize=(7.6, 1.5), layout="constrained")
    show(axes[0], picture, "picture")
    still = Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).resize((128, 128))
    for axis, word, place in zip(axes[1:], words, places, strict=True):
        values = sum(m.values / m.values.sum() for m in found if m.token == place[0])
        assert isinstance(values, Tensor)
        bare(axis, f"“{word}”").imshow(render(values, still))
    save(figure, path)


class _Biased(nn.Module):
    """Attention over an 8 x 8 grid with an additive bias, as a ViT with relative positions has it."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


def bias(use: str, path: Path) -> None:
    """A smooth bias, its factors' product, and the attention with either, on queries of the embedded ViT."""
    vit, log = model("vit"), []
    with mmattn.attach(vit.target, watched(mmattn.Identity(), lambda s: s.index == 0, seen := [])):
        picture, _ = draw_batch(1, torch.Generator().manual_seed(HELD_OUT_SEED))
        logits(vit, picture * 2 - 1)
    tokens = seen[0].dense.shape[-1] - 1
    side = int(tokens**0.5)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    distance = (at.view(-1, 1, 2) - at.view(1, -1, 2)).float().norm(dim=-1)
    table = torch.stack([3 * torch.exp(-((distance / w) ** 2)) for w in (2.0, 4.0)])[None]
    q = F.one_hot(torch.arange(tokens)).float()[None, None].expand(1, 2, -1, -1)
    scores = seen[0].dense[0, 1:, 1:].clamp_min(1e-6).log() * tokens**0.5
    k = scores.T.contiguous()[None, None].expand(1, 2, -1, -1)
    module = _Biased(table)
    method = made(use)
    with mmattn.attach(module, watched(method, lambda s: True, log)), torch.no_grad():
        module(q, k, q.contiguous())
    one: Seen = log[0]
    factors = factorise(table, energy=method.energy, most=method.max_rank)
    centred = table - table.mean(-1, keepdim=True)
    product = (factors.query @ factors.key.mT)[0]
    rank = factors.rank.flatten().tolist()
    figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.3), layout="constrained")
    for row in range(2):
        show(axes[row][0], centred[0, row], "bias, key mean off", cmap="viridis")
        show(
            axes[row][1], product[row], f"its factors, rank {rank[row]} of {tokens}", cmap="viridis"
        )
        top = float(one.dense[row].max())
        show(
            axes[row][2], one.dense[row], "attention, bias added", cmap="viridis", vmin=0, vmax=top
        )
        error = float((one.method[row] - one.dense[row]).abs().max())
        title = f"with factors: {error:.1g} off"
        show(axes[row][3], one.method[row], title, cmap="viridis", vmin=0, vmax=top)
        axes[row][0].set_ylabel(("narrow bump", "wide bump")[row])
    save(figure, path)


def agents(use: str, path: Path) -> None:
    """What the tokens of a picture merge into, in a UNet with random weights."""
    from diffusers import UNet2DConditionModel

    picture = draw(model("t2i"), [PROMPT], [0], steps=STEPS)[0]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
    ).eval()
    method, found = made(use), []
    base = type(method)

    class Watched(base):  # type: ignore[misc, valid-type]
        def leave(self, x: Tensor, *, site: Any) -> Tensor:
            if "merged" in site.state:
                found.append(site.state["merged"])
            return base.leave(self, x, site=site)

    copy = Watched(**{k: v for k, v in method.to_dict().items() if k != "name"})
    small = F.avg_pool2d(picture[None], 2)
    latents = torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1
    with mmattn.attach(unet, copy), torch.no_grad():
        unet(latents, 500, torch.zeros(1, 4, 16))
    merged_ = found[0]
    match = merged_.found
    groups = []
    for r in (merged_.r, merged_.tokens - merged_.agents):
        into = torch.arange(merged_.tokens)
        into[match.src[0, :r]] = match.dst[match.into[0, :r]]
        groups.append(into.unique(return_inverse=True)[1])
    figure, axes = plt.subplots(1, 3, figsize=(5.6, 2.1), layout="constrained")
    show(axes[0], small[0], f"picture, {merged_.tokens} tokens")
    show(axes[1], _painted(small[0], groups[0], 32), f"{merged_.features} features")
    show(axes[2], _painted(small[0], groups[1], 32), f"{merged_.agents} agents")
    save(figure, path)


SMALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 16}


def segregation(use: str, path: Path) -> None:
    """Equal noise without and with guidance; the overlap of the two words' maps on average over the steps."""
    from mmattn_pipelines.attention_guidance import AttentionGuidance

    method = made(use)
    settings = {k: v for k, v in method.to_dict().items() if k != "name"}
    # A step of no length leaves the picture alone and still measures the overlap.
    still = type(method)(**{**settings, "alpha": 1e-12})
    pairs = (
        ("red circle", "blue square"),
        ("green star", "yellow circle"),
        ("blue circle", "orange square"),
        ("yellow star", "red square"),
        ("green square", "red circle"),
    )
    figure, axes = plt.subplots(2, len(pairs), figsize=(7.0, 3.2), layout="constrained")
    for row, one in enumerate((still, method)):
        run = AttentionGuidance(model("t2i").target, one)
        for column, words in enumerate(pairs):
            out = run(
                f"a {words[0]} with a {words[1]} on a white background",
                words=[words],
                num_inference_steps=8,
                true_cfg_scale=3.0,
                negative_prompt="",
                generator=torch.Generator().manual_seed(column),
                output_type="pt",
                **SMALL,
            ).images[0]
            overlap = sum(step.segregation[0] for step in run.trace) / len(run.trace)
            head = "" if row else " with\n".join(words) + "\n"
            show(axes[row][column], out, f"{head}overlap {overlap:.2f}")
    axes[0][0].set_ylabel("untouched")
    axes[1][0].set_ylabel(method.name)
    save(figure, path)


def subjects(use: str, path: Path) -> None:
    """References, the scene drawn alone, and the scene drawn with them, from equal noise."""
    from mmattn_pipelines.subject_consistency import SubjectConsistency

    draw_scene = SubjectConsistency(model("t2i").target, made(use))
    figure, axes = plt.subplots(3, 4, figsize=(5.4, 4.2), layout="constrained")
    subjects_ = (
        ("red circle", "blue square"),
        ("green star", "red square"),
        ("blue circle", "yellow star"),
    )
    for row, (left, right) in enumerate(subjects_):
        words = [left.split()[1], right.split()[1]]
        out = draw_scene(
            [
                f"a {left} in the center on a white background",
                f"a {right} in the center on a white background",
            ],
            f"a {words[0]} left of a {words[1]} on a white background",
            words=words,
            seed=10 * row,
            num_inference_steps=10,
            **SMALL,
        )
        titles = ("reference 1", "reference 2", "scene alone", "with references")
        tiles = (*out.references, out.rehearsal, out.scene)
        for axis, tile, title in zip(axes[row], tiles, titles, strict=True):
            show(axis, tile, title if row == 0 else "")
    save(figure, path)
