"""The demos in a real browser: every tab gives a result, and the page stays quiet, local and usable."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.browser

SLOW = 90_000
"""Milliseconds; a busy machine takes many times what it takes alone."""
NARROW = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def expect():
    from playwright.sync_api import expect

    expect.set_options(timeout=SLOW)
    return expect


def tab(page, name):
    """Open a tab, from the menu of those that do not fit if need be."""
    shown = page.get_by_role("tab", name=name, exact=True)
    if shown.count() and shown.first.is_visible():
        shown.first.click()
        return
    page.get_by_label("More tabs").first.click()
    page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()


def few_steps(page, name):
    """Ask for three denoising steps."""
    page.get_by_role("button", name="More settings").locator("visible=true").click()
    page.fill(f"#{name}-steps input[type=number]", "3")
    page.keyboard.press("Tab")


def loaded(page, selector, count=1):
    """Wait until `count` pictures below `selector` are drawn."""
    page.wait_for_function(
        "([s, n]) => [...document.querySelectorAll(s + ' img')]"
        ".filter((img) => img.complete && img.naturalWidth > 0).length >= n",
        arg=[selector, count],
        timeout=SLOW,
    )


def test_image(visit, expect):
    page = visit.go()
    few_steps(page, "image")
    page.click("#image-run")
    expect(page.locator("#image-status")).to_contain_text("dB from dense")
    loaded(page, "#image-slider", 2)
    loaded(page, "#image-preview")
    handle = page.locator("#image-slider .outer").first
    if not handle.count():
        handle = page.locator("#image-slider [role=slider]").first
    before = handle.bounding_box()
    middle = (before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 90, middle[1], steps=4)
    page.mouse.up()
    assert before["x"] - handle.bounding_box()["x"] > 60
    page.get_by_role("tab", name="Numbers").first.click()
    expect(page.locator("#image-numbers tbody tr")).to_have_count(8)
    loaded(page, "#image-density")
    page.get_by_role("tab", name="Code").first.click()
    expect(page.locator("#image-python")).to_contain_text("VMoBA(topk=0.25)")
    expect(page.locator("#image-command")).to_contain_text("mmattn generate --model t2i")
    page.get_by_role("tab", name="Attention", exact=True).first.click()
    page.fill("#image-word input, #image-word textarea", "green")
    page.click("#image-look")
    loaded(page, "#image-heat")


def test_seed_and_examples(visit, expect):
    page = visit.go()
    prompt = page.locator("#image-prompt textarea")
    before = prompt.input_value()
    page.click("#image-example")
    expect(prompt).not_to_have_value(before)
    page.click("#image-dice")
    expect(page.locator("#image-seed input")).not_to_have_value("7")
    page.click("#image-method input")
    page.get_by_role("option", name="SparseD, small blocks").click()
    expect(page.locator("#image-note")).to_contain_text("last dense step")


def test_video(visit, expect):
    page = visit.go()
    tab(page, "Video")
    few_steps(page, "video")
    page.click("#video-run")
    expect(page.locator("#video-status")).to_contain_text("dB from dense")
    state = """() => ['dense', 'method'].map((id) => {
      const clip = document.querySelector(`#video-${id} video`);
      return clip && {ready: clip.readyState, long: clip.duration, now: clip.currentTime,
                      on: !clip.paused, loop: clip.loop, wide: clip.videoWidth};
    })"""
    page.wait_for_function(
        f"() => ({state})().every((c) => c && c.ready >= 2 && c.on && c.now > 0.15)", timeout=SLOW
    )
    clips = page.evaluate(state)
    for clip in clips:
        assert clip["long"] == pytest.approx(17 / 8, abs=0.2) and clip["wide"] == 384
        assert clip["loop"]
    apart = abs(clips[0]["now"] - clips[1]["now"])
    assert min(apart, clips[0]["long"] - apart) < 0.3


def test_vlm(visit, expect):
    page = visit.go()
    tab(page, "VLM")
    page.click("#vlm-example")
    loaded(page, "#vlm-picture")
    page.click("#vlm-run")
    expect(page.locator("#vlm-status")).to_contain_text("32 of 64 image tokens")
    expect(page.locator("#vlm-answers .answer")).to_have_count(2)
    assert page.locator("#vlm-answers b").count() > 0
    loaded(page, "#vlm-kept")


def test_tokens(visit, expect):
    page = visit.go()
    tab(page, "Tokens & attention")
    page.click("#tokens-example")
    loaded(page, "#tokens-picture")
    page.click("#tokens-run")
    expect(page.locator("#tokens-status strong")).to_be_visible()
    loaded(page, "#tokens-layers", 8)
    loaded(page, "#tokens-kept")
    tab(page, "A classifier")
    page.click("#classify-example")
    loaded(page, "#classify-picture")
    page.click("#classify-run")
    expect(page.locator("#classify-status")).to_contain_text("as dense")
    loaded(page, "#classify-merged")


def test_image_sets(visit, expect):
    page = visit.go()
    tab(page, "Image sets")
    page.click("#imagesets-example")
    expect(page.locator("#imagesets-files")).to_contain_text("example")
    few_steps(page, "imagesets")
    page.click("#imagesets-run")
    expect(page.locator("#imagesets-status")).to_contain_text("at density")
    loaded(page, "#imagesets-slider", 2)
    loaded(page, "#imagesets-gallery", 2)


def test_bench(visit, expect):
    page = visit.go()
    tab(page, "Bench")
    page.get_by_label("Picture to class").check()
    expect(page.locator("#bench-methods")).to_contain_text("ToMe")
    page.click("#bench-run")
    expect(page.locator("#bench-status")).to_contain_text("2 of 2")
    expect(page.locator("#bench-chart .fill")).to_have_count(2)


def test_bad_input_says_what_to_do(visit, expect, tmp_path):
    page = visit.go()
    page.fill("#image-prompt textarea", "")
    page.click("#image-run")
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("type one")
    page.get_by_test_id("toast-close").click()
    tab(page, "VLM")
    page.click("#vlm-run")
    expect(toast).to_contain_text("upload one")
    page.get_by_test_id("toast-close").click()
    (tmp_path / "disguised.png").write_text("<html>not a picture</html>")
    page.set_input_files("#vlm-picture input[type=file]", tmp_path / "disguised.png")
    page.wait_for_selector("#vlm-picture img", timeout=SLOW, state="attached")
    page.click("#vlm-run")
    expect(toast).to_contain_text("PNG, JPEG or WebP")
    # The browser logs the picture that it cannot show; nothing else may be wrong.
    visit.wrong[:] = [text for text in visit.wrong if "disguised" not in text]


def test_a_second_visitor_waits_in_the_queue(visit, expect, demo_models):
    first, second = visit.go(), visit.go()
    few_steps(first, "image")
    with demo_models.lock:
        first.click("#image-run")
        first.wait_for_function(
            "() => /processing|queue/.test(document.querySelector('#image-status').innerText)"
        )
        second.click("#image-run")
        expect(second.locator("#image-status")).to_contain_text(re.compile(r"queue: 1/1"))
        assert not visit.wrong
        second.reload()
        second.wait_for_selector("#image-run")
    few_steps(second, "image")
    expect(first.locator("#image-status")).to_contain_text("dB from dense")
    second.click("#image-run")
    expect(second.locator("#image-status")).to_contain_text("dB from dense")
    # Gradio logs the stream that the reload cut off.
    cut = re.compile("aborted|Connection errored out")
    visit.wrong[:] = [text for text in visit.wrong if not cut.search(text)]


def test_cancel(visit, expect, demo_models):
    page = visit.go()
    few_steps(page, "image")
    with demo_models.lock:
        page.click("#image-run")
        page.wait_for_function(
            "() => /processing/.test(document.querySelector('#image-status').innerText)"
        )
        page.click("#image-stop")
        expect(page.locator("#image-status")).to_contain_text("Stopped.")
    page.click("#image-run")
    expect(page.locator("#image-status")).to_contain_text("dB from dense")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(visit, scheme, tmp_path):
    page = visit.go(**NARROW, scheme=scheme)
    for name in ("Image", "Video", "Image sets", "VLM", "Tokens & attention", "Bench"):
        tab(page, name)
        page.wait_for_timeout(60)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= NARROW["width"], f"{name} is {wide} pixels wide"
    dark = page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    shot = page.screenshot(path=tmp_path / f"{scheme}.png")
    assert len(shot) > 5000


def test_every_control_has_a_name(visit):
    page = visit.go()
    for name in ("Image", "Video", "Image sets", "VLM", "Tokens & attention", "Bench"):
        tab(page, name)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button, select')]
              .filter((e) => e.offsetParent && e.type !== 'file')
              .filter((e) => !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
                && !e.getAttribute('aria-labelledby') && !e.title && !e.innerText.trim())
              .map((e) => e.outerHTML.slice(0, 120))"""
        )
        assert not nameless, name
