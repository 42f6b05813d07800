"""The method menu: every preset attaches and does something, typed text is read as the command line does."""

from __future__ import annotations

import pytest
from mmattn_demos.presets import chosen, command_text, note_of, presets
from mmattn_demos.snippets import constructor, recipe_text

import mmattn
from mmattn.config import load
from mmattn.errors import ConfigError
from mmattn.variants import parse

KINDS = ("t2i", "t2v", "vlm", "vit")


@pytest.mark.parametrize("kind", KINDS)
def test_presets_attach_to_the_embedded_model(kind, models):
    offers = presets(kind)
    assert len({one.label for one in offers}) == len(offers) >= 4
    for offer in offers:
        mmattn.attach(models.get(kind).target, list(offer.column.methods)).detach()
        assert note_of(offer.label, kind)
    assert kind == "vit" or any(len(offer.column.methods) > 1 for offer in offers)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_menu_shows_is_what_the_command_line_reads(kind, tmp_path):
    for offer in presets(kind):
        text = command_text(offer.column, kind)
        if text is None:
            path = tmp_path / "recipe.toml"
            path.write_text(recipe_text(offer.column), encoding="utf-8")
            assert load(path).methods == offer.column.methods
        else:
            assert parse(text).methods == offer.column.methods


def test_typed_methods():
    column = chosen("vmoba:topk=0.3,chunks=[0.25,[3,3],[1,3,3]]", "t2i")
    assert parse(command_text(column, "t2i")).methods == column.methods
    assert (
        eval(constructor(column.methods[0]), vars(mmattn) | {"VMoBA": mmattn.VMoBA})
        == (column.methods[0])
    )
    assert chosen("", "t2i").methods == chosen("dense", "vlm").methods == ()


@pytest.mark.parametrize(
    "text",
    [
        "vmobba",
        "vmoba:topq=1",
        "vmoba:topk=7,,=",
        "../../secret.toml",
        "/etc/passwd.json",
        '{"name": "vmoba"',
        "{}",
        "+",
        "vmoba:topk=" + "1" * 400,
        "vmoba\x00",
    ],
)
def test_bad_methods_are_refused_in_a_sentence(text):
    with pytest.raises(ConfigError) as caught:
        chosen(text, "t2i")
    assert "/etc" not in str(caught.value) and "secret" not in str(caught.value)
