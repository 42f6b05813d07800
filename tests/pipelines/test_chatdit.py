"""Conversations: what is drawn from what, what is remembered, what survives a failure, what is exported."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from mmattn_pipelines.captions import SetCaption
from mmattn_pipelines.chatdit import ChatDiT
from mmattn_pipelines.chatdit_article import Article, escape
from mmattn_pipelines.chatdit_drawing import GroupGenerator
from mmattn_pipelines.chatdit_plan import ContractError, PlannerError
from mmattn_pipelines.chatdit_planners import RulePlanner
from mmattn_pipelines.chatdit_scenes import (
    EMBEDDED_PANEL,
    describe_scene,
    embedded,
    scene_caption,
)
from mmattn_pipelines.in_context import InContextPipeline
from mmattn_pipelines.panels import PanelLayout
from PIL import Image

import mmattn.mini
from mmattn.errors import ConfigError
from mmattn.mini.scenes import draw_scenes, make_scenes
from mmattn.mini.text import unknown_words


class Noise:
    """A real generator without a model: given panels stay, the others are noise of the generator."""

    def __init__(self, fail_at: int = 0, error: type[BaseException] = RuntimeError) -> None:
        self.calls: list[SimpleNamespace] = []
        self.fail_at, self.error = fail_at, error

    def __call__(self, caption: Any, *, layout: PanelLayout, references, generator, **options: Any):
        self.calls.append(SimpleNamespace(caption=caption, layout=layout, references=references))
        if len(self.calls) == self.fail_at:
            raise self.error("out of memory")
        size = (layout.count - len(references), layout.panel_height, layout.panel_width, 3)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy()
        return SimpleNamespace(images=[*references, *map(Image.fromarray, pixels)])


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def talk(generator=None, **settings) -> ChatDiT:
    return ChatDiT(generator or Noise(), RulePlanner(), panel=(16, 16), **settings)


def test_a_round_is_remembered_and_the_next_one_refers_to_it():
    draw = Noise()
    chat = talk(draw)
    fox, hen = chat.chat("Two pictures: a fox; a hen").images
    reply = chat.chat("Make the second image blue")
    assert [p.description for p in chat.pictures] == ["a fox", "a hen", "a hen, blue"]
    assert [p.name for p in chat.pictures][2] == "picture_0003_hen-blue"
    assert reply.plan.sources == (2,) and reply.text == "Drew 1 picture: a hen, blue."
    assert len(draw.calls) == 2
    assert same(draw.calls[1].references[0], hen) and not same(hen, fox)
    assert draw.calls[0].caption.text == "[TWO-PANEL] [LEFT] a fox; [RIGHT] a hen"
    assert isinstance(draw.calls[1].caption, SetCaption)


def test_one_picture_is_drawn_from_its_description_alone():
    draw = Noise()
    talk(draw).chat("a fox")
    assert draw.calls[0].caption == "a fox" and draw.calls[0].layout.count == 1


@pytest.mark.parametrize(("given", "wanted"), [(0, 6), (1, 3), (3, 1), (2, 2), (12, 1), (1, 13)])
def test_canvases_follow_the_plan(given: int, wanted: int):
    draw = Noise()
    chat = talk(draw)
    images = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(given)]
    captions = [f"thing {i}" for i in range(given)]
    message = f"Draw {wanted} pictures of a fox" if wanted > 1 else "a fox"
    reply = chat.chat(message, images, captions=captions)
    assert len(reply.images) == wanted
    everything = [*images, *reply.images]
    for call, step in zip(draw.calls, reply.plan.steps, strict=True):
        seen = [everything[i] for i in step.group.references]
        assert all(same(a, b) for a, b in zip(call.references, seen, strict=True))
        assert call.layout.count == len(step.panels) <= 12


def test_sizes_follow_the_given_pictures():
    draw = Noise()
    chat = ChatDiT(draw, RulePlanner())
    chat.chat("make it blue", [Image.new("RGB", (320, 180))], captions=["a fox"])
    layout = draw.calls[0].layout
    assert (layout.panel_height, layout.panel_width, layout.rows) == (768, 1344, 2)
    assert draw.calls[0].references[0].size == (1344, 768)


def test_noise_is_named_by_seed_round_and_step():
    chat = talk()
    first = chat.chat("Draw 6 pictures of a fox").images
    second = chat.chat("Draw 6 pictures of a fox").images
    drawn = [np.asarray(image).tobytes() for image in (*first, *second)]
    assert len(set(drawn)) == 12
    again = talk()
    again.chat("a hen")
    assert all(map(same, again.chat("Draw 6 pictures of a fox").images, second))
    assert not same(talk(seed=1).chat("a hen").images[0], talk(seed=2).chat("a hen").images[0])
    assert same(talk().chat("a hen", seed=1).images[0], talk(seed=1).chat("a hen").images[0])


def test_the_global_generator_is_not_touched():
    state = torch.random.get_rng_state()
    talk().chat("a fox")
    assert torch.equal(state, torch.random.get_rng_state())


def test_given_pictures_are_brought_into_rgb():
    draw = Noise()
    chat = talk(draw)
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    turned = Image.new("RGB", (16, 8), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    chat.chat("mix them", [clear, turned, Image.new("L", (4, 4), 9)])
    white, upright, gray = (p.image for p in chat.pictures[:3])
    assert {white.mode, upright.mode, gray.mode} == {"RGB"}
    assert white.getpixel((0, 0)) == (255, 255, 255) and upright.size == (8, 16)


def test_wrong_messages_leave_no_trace():
    chat = talk()
    with pytest.raises(ConfigError, match="message is empty"):
        chat.chat("  ")
    with pytest.raises(ConfigError, match="1 pictures came with 2 captions"):
        chat.chat("it", [Image.new("RGB", (4, 4))], captions=["a", "b"])
    assert chat.rounds == () and chat.pictures == ()


# failures, saving and loading


def test_a_failed_round_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    whole = talk()
    whole.chat("Two pictures: a fox; a hen")
    expected = whole.chat("Three pictures of #1").images

    chat = talk(Noise(fail_at=3), folder=tmp_path)
    chat.chat("Two pictures: a fox; a hen")
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.chat("Three pictures of #1")
    assert len(chat.pictures) == 3 and chat.rounds[-1].error == "RuntimeError: out of memory"
    del chat  # as after the death of the process

    restored = ChatDiT.load(tmp_path, draw := Noise(), RulePlanner())
    assert [p.description for p in restored.pictures] == ["a fox", "a hen", "a fox"]
    assert all(map(same, [p.image for p in restored.pictures], [p.image for p in whole.pictures]))
    images = restored.resume().images
    assert len(draw.calls) == 2 and all(map(same, images, expected)) and len(images) == 3
    assert restored.rounds[-1].complete and restored.rounds[-1].error is None
    assert ChatDiT.load(tmp_path, Noise(), RulePlanner()).rounds == restored.rounds


def test_a_message_that_cannot_be_planned_keeps_its_pictures():
    chat = talk()
    with pytest.raises(PlannerError, match="fifth picture"):
        chat.chat("Make the fifth picture blue", [Image.new("RGB", (16, 16))], captions=["a fox"])
    assert len(chat.pictures) == 1 and "PlannerError" in chat.rounds[0].error
    assert chat.chat("Make it blue").plan.sources == (1,)
    with pytest.raises(ConfigError, match=r"round 1 has no answer.*complete are \[2\]"):
        chat.reply(1)


def test_an_interrupt_is_recorded_and_passed_on(tmp_path: Path):
    chat = talk(Noise(fail_at=1, error=KeyboardInterrupt), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        chat.chat("a fox")
    assert len(ChatDiT.load(tmp_path, Noise(), RulePlanner()).resume().images) == 1


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    chat = talk(seed=7)
    chat.chat('make it a <Mira> "quote" ünï', [Image.new("RGB", (20, 10), "red")], captions=["x"])
    article = chat.article("Write an article about foxes: a fox; a den")
    chat.save(tmp_path)
    loaded = ChatDiT.load(tmp_path, Noise(), RulePlanner())
    assert loaded.rounds == chat.rounds and loaded.pictures == chat.pictures
    assert all(map(same, [p.image for p in loaded.pictures], [p.image for p in chat.pictures]))
    assert loaded.reply(2).article.markdown == article.markdown
    assert same(loaded.chat("a hen").images[0], chat.chat("a hen").images[0])
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".json"}


def test_another_conversation_is_not_overwritten(tmp_path: Path):
    talk(folder=tmp_path).chat("a fox")
    before = (tmp_path / "conversation.json").read_bytes()
    with pytest.raises(ConfigError, match="holds another conversation"):
        talk().save(tmp_path)
    assert (tmp_path / "conversation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(form=9), "not a conversation of form 1"),
        (lambda data: data.pop("seed"), "damaged: 'seed'"),
        (lambda data: data["pictures"][0].update(name="../../x"), "'../../x' is not the name"),
        (lambda data: data["pictures"][0].update(name="picture_0009_x"), "No such file"),
        (lambda data: data["rounds"][0]["plan"].pop("parsing"), "saved plan is incomplete"),
        (lambda data: data["rounds"][0].update(odd=1), "odd"),
    ],
)
def test_a_damaged_conversation_is_named(tmp_path: Path, change, said: str):
    talk(folder=tmp_path).chat("a fox")
    path = tmp_path / "conversation.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said):
        ChatDiT.load(tmp_path, Noise(), RulePlanner())


def test_no_conversation(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"conversation\.json is missing"):
        ChatDiT.load(tmp_path, Noise(), RulePlanner())
    with pytest.raises(ConfigError, match="no unfinished round"):
        talk().resume()


# articles


def links(path: Path) -> list[str]:
    """Targets of the pictures of a Markdown file, read by another implementation."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or []]
    return [child.attrs["src"] for child in inline if child.type == "image"]


def test_an_article_is_exported_with_its_pictures_in_order(tmp_path: Path):
    chat = talk()
    article = chat.article("Write an article about animals: a fox-cub; a hen; a dog; an ape; a cow")
    path = article.export(tmp_path / "out", "../My article!")
    assert path == tmp_path / "out" / "My-article.md"
    assert [target[:11] for target in links(path)] == [f"output_000{i}" for i in range(1, 6)]
    for target, drawn in zip(links(path), chat.pictures, strict=True):
        with Image.open(path.parent / target) as shown:
            assert same(shown, drawn.image)
    assert len(list(path.parent.iterdir())) == 6


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "a *b* _c_ `d` # e", "![x](http://y/z.png)", "[x](javascript:y)"],
)
def test_texts_of_users_stay_texts(tmp_path: Path, text: str):
    chat = talk()
    path = chat.article(f"an article about {text}").export(tmp_path)
    html = MarkdownIt("commonmark", {"html": True}).render(path.read_text(encoding="utf-8"))
    assert "<script" not in html and 'javascript:y"' not in html and "<em>" not in html
    assert len(links(path)) == 3
    shown = MarkdownIt().render(escape(text))
    plain = (
        shown.removeprefix("<p>").removesuffix("</p>\n").replace("&lt;", "<").replace("&gt;", ">")
    )
    assert plain == text


def test_an_article_that_hides_a_picture_fails_and_keeps_it():
    class Lazy(RulePlanner):
        def write(self, plan) -> str:
            return "# Nothing"

    chat = ChatDiT(Noise(), Lazy(), panel=(16, 16))
    with pytest.raises(ContractError, match="never shows output_0001_fox"):
        chat.article("a fox in one picture")
    assert len(chat.pictures) == 1
    chat.planner = RulePlanner()
    assert chat.resume().article.pictures.keys() == {"output_0001_fox"}


def test_given_pictures_may_be_shown():
    class Both(RulePlanner):
        def write(self, plan) -> str:
            return "\n".join(f"![x]({i.image_id}.png)" for i in (*plan.inputs, *plan.outputs))

    given = Image.new("RGB", (16, 16), "red")
    chat = ChatDiT(Noise(), Both(), panel=(16, 16))
    article = chat.article("it in blue, in one picture", [given], captions=["a fox"])
    assert list(article.pictures) == ["input_0001_fox", "output_0001_blue"]
    assert same(article.pictures["input_0001_fox"], given)


def test_raw_html_is_taken_out_of_an_article():
    image = Image.new("RGB", (4, 4))
    article = Article("<img src=x onerror=y>\n\n![a](a.png)", {"a": image})
    assert "<" not in article.markdown and "&lt;img" in article.markdown


# the embedded model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", "a red circle on a white background"),
        ("a red circle on a black background, make it blue", "a blue circle on a black background"),
        ("Two orange stars", "two orange stars on a white background"),
        (
            "a BIG purple ring in the middle, grey",
            "a big purple ring in the center on a gray background",
        ),
        ("a lovely orange star at the top", "an orange star on the top on a white background"),
        (
            "a red circle left of a blue square on a white background, black",
            "a red circle left of a blue square on a black background",
        ),
    ],
)
def test_captions_stay_in_the_language_of_the_embedded_model(text: str, expected: str):
    assert scene_caption(text) == expected
    assert unknown_words(expected) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red fox", "names no shape"),
        ("a circle", "names no colour"),
        ("a red circle above a blue square, green star", "changes one of two objects"),
    ],
)
def test_what_the_embedded_model_cannot_draw_is_said(text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        scene_caption(text)


def test_captions_of_training_come_through_unchanged():
    scenes = make_scenes(300, 5)
    assert [scene_caption(s.caption) for s in scenes] == [s.caption for s in scenes]


def test_pictures_are_described_in_the_same_language():
    scenes = make_scenes(60, 6)
    pixels = (draw_scenes(scenes) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    said = [describe_scene(Image.fromarray(picture)) for picture in pixels]
    assert [scene_caption(text) for text in said] == said
    for scene, text in zip(scenes, said, strict=True):
        if scene.kind != "one":
            continue
        thing = scene.things[0]
        assert f"{thing.colour} {thing.shape}" in text and f"{scene.background} background" in text
        assert ("big" in text) == (thing.radius > 11.75)
        assert scene.position is None or f"the {scene.position}" in text
    with pytest.raises(ConfigError, match="shows no object"):
        describe_scene(Image.new("RGB", (64, 64), "white"))


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return embedded(steps=6)


def test_two_rounds_on_the_embedded_model(settings, tmp_path: Path):
    chat = ChatDiT(panel=EMBEDDED_PANEL, folder=tmp_path, **settings)
    first = chat.chat(
        "Two pictures: a big red circle in the center on a white background; "
        "a big blue square in the center on a black background"
    )
    second = chat.chat("Make the second image green and show it on a gray background")
    seen = [describe_scene(image) for image in (*first.images, *second.images)]
    assert "red" in seen[0] and "white background" in seen[0]
    assert "blue" in seen[1] and "black background" in seen[1]
    assert "green" in seen[2] and "gray background" in seen[2]
    assert second.plan.sources == (2,)

    loaded = ChatDiT.load(tmp_path, **settings)
    again = loaded.chat("Make it purple").images[0]
    assert same(again, chat.chat("Make it purple").images[0])


def test_an_uploaded_picture_is_looked_at(settings):
    scene = next(s for s in make_scenes(50, 3) if s.kind == "one" and s.things[0].colour == "red")
    pixels = (draw_scenes([scene]) * 255).byte()[0].permute(1, 2, 0).numpy()
    chat = ChatDiT(panel=EMBEDDED_PANEL, **settings)
    chat.options = {**settings["options"], "num_inference_steps": 1}
    plan = chat.chat("Make it blue", [Image.fromarray(pixels)]).plan
    assert f"red {scene.things[0].shape}" in plan.inputs[0].description
    assert chat.pictures[0].description == plan.inputs[0].description
    assert plan.outputs[0].description.endswith(", blue")


def test_a_canvas_of_panels_goes_through_the_same_chat():
    """The default generator and caption style, on one canvas with a kept panel."""
    draw = InContextPipeline(mmattn.mini.load("t2i"))
    options = {"num_inference_steps": 1, "max_sequence_length": 16}
    chat = ChatDiT(draw, RulePlanner(), panel=(32, 32), options=options)
    given = Image.new("RGB", (32, 32), "red")
    reply = chat.chat("Make it blue", [given], captions=["a red circle"])
    assert [image.size for image in reply.images] == [(32, 32)]
    assert not same(reply.images[0], given)


def test_the_example_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch):
    path = Path(__file__).parents[2] / "pipelines" / "examples" / "illustrated_article.py"
    spec = importlib.util.spec_from_file_location("illustrated_article", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    plain = GroupGenerator.__call__
    calls = []

    def killed_in_the_second(self, caption, **arguments):
        calls.append(len(caption))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, caption, **arguments)

    monkeypatch.setattr(GroupGenerator, "__call__", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        example.main(["--out", str(tmp_path), "--steps", "1"])
    assert not (tmp_path / "article-1").exists()
    assert example.main(["--out", str(tmp_path), "--steps", "1"]) == 0
    assert calls == [4, 4, 4, 4]  # four pictures; then one and the three it sees, twice, once again
    assert len(links(tmp_path / "article-1" / "article.md")) == 6
