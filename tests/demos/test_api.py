"""The stable endpoints, called as a program would, give what the library gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmattn_demos import pictures
from PIL import Image

import mmattn
from mmattn.batch.writers import to_pixels
from mmattn.calls import draw

gradio_client = pytest.importorskip(
    "gradio_client", reason="the API is tested through [demo]'s client"
)
PROMPT = "a big red circle on the left on a white background"


@pytest.fixture(scope="module")
def api(server):
    return gradio_client.Client(server, verbose=False, analytics_enabled=False)


@pytest.fixture
def scene(tmp_path):
    image, names = pictures.scene(3)
    image.save(tmp_path / "scene.png")
    return gradio_client.handle_file(str(tmp_path / "scene.png")), names


def small(path, factor):
    """The picture as the model drew it."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[::factor, ::factor]


NAMES = {
    "/compare": "prompt method seed steps guidance width height",
    "/generate": "prompt method seed steps guidance width height",
    "/video": "prompt method seed steps guidance width height frames",
    "/imageset": "captions shared arrangement seen images seed steps guidance",
    "/vlm_answer": "image question method seed new_tokens objects",
    "/tokens": "model image text word method seed steps",
    "/classify": "image method classes",
    "/bench": "model methods repeats steps seed",
}


def test_endpoints_and_their_arguments_have_names(api):
    listed = api.view_api(return_format="dict", print_info=False)["named_endpoints"]
    found = {
        name: " ".join(one["parameter_name"] for one in known["parameters"])
        for name, known in listed.items()
    }
    assert found == NAMES
    labels = [one["label"] for known in listed.values() for one in known["returns"]]
    assert not [label for label in labels if label.startswith("value_")]


def test_arguments_by_name(api):
    given = {"prompt": PROMPT, "method": "dense", "seed": 6, "steps": 2}
    one, _ = api.predict(**given, api_name="/generate")
    other, _ = api.predict(PROMPT, "dense", 6, 2, 3.0, 64, 64, api_name="/generate")
    third, _ = api.predict(**{**given, "seed": 7}, api_name="/generate")
    assert (small(one, 6) == small(other, 6)).all() and (small(one, 6) != small(third, 6)).any()


def test_compare(api, models):
    pair, status, _, table, rows, _, notes, python, command, _ = api.predict(
        PROMPT, "VMoBA, a quarter of the chunks", 5, 4, 3.0, 64, 64, api_name="/compare"
    )
    pipe = models.get("t2i")
    dense = draw(pipe, [PROMPT], [5], steps=4, guidance=3.0)[0]
    with mmattn.attach(pipe.target, mmattn.VMoBA(topk=0.25), seed=5) as session:
        other = draw(pipe, [PROMPT], [5], steps=4, guidance=3.0)[0]
    assert (small(pair[0], 6) == to_pixels(dense)).all()
    assert (small(pair[1], 6) == to_pixels(other)).all()
    assert not torch.equal(dense, other)
    assert rows[1]["density"] == round(session.stats.density, 4) < 1
    assert rows[1]["calls"] == session.stats.calls and rows[0]["density"] is None
    assert "density" in status and "<table" in table and "VMoBA(topk=0.25)" in python
    assert command.startswith("mmattn generate") and "dense_steps" in notes


def test_generate(api, models):
    picture, status = api.predict(PROMPT, "dense", 6, 2, 3.0, 64, 64, api_name="/generate")
    drawn = draw(models.get("t2i"), [PROMPT], [6], steps=2, guidance=3.0)[0]
    assert (small(picture, 6) == to_pixels(drawn)).all() and "dense" in status


def test_video(api):
    import av

    answer = api.predict(
        "a red circle moving right on a white background",
        *("VMoBA by layer (composition)", 5, 2, 3.0, 64, 64, 17),
        api_name="/video",
    )
    for path in answer[:2]:
        with av.open(path) as film:
            assert film.streams.video[0].codec_context.name == "h264"
            assert sum(1 for _ in film.decode(video=0)) == 17
    rows = answer[5]
    assert 0 < rows[1]["density"] < 1 and answer[-1].count("[[method]]") == 2


def test_vlm_answer(api, models, scene):
    from mmattn.calls import answer

    picture, names = scene
    image, _ = pictures.scene(3)
    said = api.predict(
        picture,
        *("describe the picture .", "HiPrune, 32 tokens", 1, 40, ", ".join(names)),
        api_name="/vlm_answer",
    )
    vlm = models.get("vlm")
    plain = answer(vlm, [image], ["describe the picture ."], max_new_tokens=40)[0]
    assert said[0] == plain and said[1] != ""
    assert "<b>" in said[2] and said[6][1]["tokens"] == "32 of 64"


def test_classify(api, scene):
    dense, _, _, status, _, rows, *_ = api.predict(
        scene[0], "ToMe, 8 tokens a block", 3, api_name="/classify"
    )
    assert len(dense["confidences"]) == 3 and 0 < dense["confidences"][0]["confidence"] <= 1
    assert "as dense" in status and rows[1]["tokens"] == "25 of 65"


def test_tokens(api, scene):
    heat, layers, _, status = api.predict(
        "vlm", scene[0], "describe the picture .", "", "hiprune:keep=16", 1, 4, api_name="/tokens"
    )
    assert len(layers) == 8 and heat and status.startswith("**")
    heat, layers, _, status = api.predict(
        "t2i", None, PROMPT, "red", "dense", 1, 2, api_name="/tokens"
    )
    assert len(layers) == 6 and "**red**" in status


def test_bench(api):
    chart, rows, status, *_ = api.predict(
        "vit", ["tome:r=8", "Random blocks, half (baseline)"], 1, 1, 0, api_name="/bench"
    )
    assert [row["refused"] for row in rows] == [None] * 3
    assert rows[1]["ratio"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
    assert "3 of 3" in status and chart.count('class="fill"') == 3


def test_imageset(api, tmp_path):
    image, caption, _ = pictures.captioned(2)
    image.save(tmp_path / "given.png")
    answer = api.predict(
        f"{caption}\na blue star on a white background",
        *("", "batch", "group"),
        [gradio_client.handle_file(str(tmp_path / "given.png"))],
        *(3, 2, 3.0),
        api_name="/imageset",
    )
    assert len(answer[1]) == 2 and "density" in answer[2]
    assert (
        small(answer[1][0]["image"], 6) == to_pixels(image)
    ).all()  # the given picture is as it was given


def test_errors_say_what_to_do(api):
    with pytest.raises(Exception, match="did you mean 'vmoba'"):
        api.predict(PROMPT, "vmobba", 5, 4, 3.0, 64, 64, api_name="/compare")
