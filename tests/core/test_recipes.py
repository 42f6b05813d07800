"""Every recipe loads, attaches to the embedded model it is for, does its work, and is in the table."""

import functools
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import mmattn
from mmattn.batch.writers import to_image
from mmattn.calls import answer, draw, logits
from mmattn.loading import resolve
from mmattn.mini import objects

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.toml"))
PROMPT = {"t2i": "a red circle on a white background", "t2v": "a red circle moving right"}


def model_of(path):
    """The model a recipe is tried on, by the first word of its name."""
    kinds = {"image": "t2i", "video": "t2v", "vlm": "vlm", "vit": "vit"}
    word = path.stem.split("-")[0]
    return kinds.get(word) or ("vlm" if path.stem.endswith("prune") else "t2v")


@functools.cache
def loaded(kind):
    return resolve(kind)


def run(kind):
    model = loaded(kind)
    if kind in PROMPT:
        return draw(model, [PROMPT[kind]], [0], steps=4)
    if kind == "vit":
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        return logits(model, pixels * 2 - 1)
    picture = to_image(
        objects.render(objects.sample_scenes(1, torch.Generator().manual_seed(5)))[0][0]
    )
    return answer(model, [picture], [objects.CAPTION_PROMPT], max_new_tokens=8)


@functools.cache
def untouched(kind):
    return run(kind)


@pytest.mark.parametrize(
    "path",
    [p for p in RECIPES if p.stem not in ("image-unet", "video-wan-480p")],
    ids=lambda p: p.stem,
)
def test_a_recipe_does_its_work_on_an_embedded_model(path):
    kind = model_of(path)
    before = untouched(kind)
    with mmattn.attach(loaded(kind).target, mmattn.load(path)) as session:
        after = run(kind)
    stats = session.stats
    assert stats.executed == stats.planned > 0
    assert not any(site.dense for site in stats.sites) or kind in PROMPT
    sparse = [s for s in stats.sites if s.density is not None and s.density < 1]
    fewer = [s for s in stats.sites if s.tokens_kept is not None and s.tokens_kept < s.tokens_in]
    watched = {"vlm-fewer-inventions", "vlm-pai", "vit-look"}
    assert bool(sparse or fewer) == (path.stem not in watched)
    if isinstance(before, torch.Tensor):
        assert torch.equal(after, before) == (path.stem == "vit-look")


def test_the_recipe_for_wan_is_the_preset():
    (method,) = mmattn.load(ROOT / "docs/recipes/video-wan-480p.toml").methods
    assert method.chunk(0, (21, 30, 52)) == mmattn.VMoBA.wan_480p().chunk(0, (21, 30, 52))
    preset = mmattn.VMoBA.wan_480p()
    assert (tuple(method.topk), method.kind, method.dense_steps) == (
        tuple(preset.topk),
        preset.kind,
        preset.dense_steps,
    )


def test_the_recipe_for_unets_makes_agents():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    with (
        torch.no_grad(),
        mmattn.attach(unet, mmattn.load(ROOT / "docs/recipes/image-unet.toml")) as s,
    ):
        s.step(0, 10)
        unet(torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 4, 8))
    sites = {site.path: site for site in s.stats.sites}
    middle = sites.pop("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert middle.notes["agents"] == 0  # a lower resolution, left alone
    assert sites and all(one.notes["agents"] == 16 for one in sites.values())
    assert all(one.tokens_kept == 154 for one in sites.values())


def test_the_table_has_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text()
    listed = set(re.findall(r"\]\(recipes/([\w-]+)\.toml\)", text))
    assert listed == {path.stem for path in RECIPES}
