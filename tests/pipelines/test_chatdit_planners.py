"""Language planners: against an HTTP server on this machine, and against real models of transformers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from mmattn_pipelines.chatdit_plan import ChatRequest, Group, Picture, PlannerError
from mmattn_pipelines.chatdit_planners import OpenAIPlanner, TransformersPlanner
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

import mmattn.mini
from mmattn.errors import ConfigError

KEY = "sk-do-not-show-1234567890"


class Server:
    """Plays an OpenAI-compatible endpoint: answers requests from a list, and keeps what it was asked."""

    def __init__(self, answers: list[Any]) -> None:
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        left = list(answers)
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, dict(self.headers), {}))
                self.send_error(404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, dict(self.headers), body))
                answer = left.pop(0)
                status, headers = 200, {}
                if callable(answer):
                    answer = answer(self)
                if isinstance(answer, tuple):
                    status, answer, headers = answer
                elif not isinstance(answer, bytes):
                    text = answer if isinstance(answer, str) else json.dumps(answer)
                    answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def questions(self) -> list[str]:
        """First words of the system prompt of every request."""
        return [" ".join(b["messages"][0]["content"].split()[:3]) for _, _, b in self.asked]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CHAT_KEY", KEY)
    running: list[Server] = []

    def start(answers: list[Any], **settings) -> tuple[Server, OpenAIPlanner]:
        server = Server(answers)
        running.append(server)
        threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
        settings = {"key_variable": "CHAT_KEY", "backoff": 0, "timeout": 5.0, **settings}
        return server, OpenAIPlanner("tiny", server.url, **settings)

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


def picture(number: int, description: str = "", *, mode: str = "RGB", size=(8, 8)) -> Picture:
    image = Image.new(mode, size, "red")
    name = f"picture_{number:04d}_given"
    return Picture(number, name, description, drawn=False, round=1, image=image)


def counting(inputs: int, outputs: int) -> dict:
    return {"explanation": "", "input_image_count": inputs, "output_image_count": outputs}


def images(kind: str, *descriptions: str) -> list[dict]:
    return [
        {"image_id": f"{kind}_{n:04d}_{text.split()[-1]}", "description": text}
        for n, text in enumerate(descriptions, 1)
    ]


def prompting(*descriptions: str) -> dict:
    items = images("output", *descriptions)
    return {"explanation": "", "descriptions": {"overview": "all", "output_images": items}}


def description(*descriptions: str) -> dict:
    items = images("input", *descriptions)
    return {"explanation": "", "descriptions": {"overview": "seen", "input_images": items}}


def panels(*clauses: str) -> dict:
    words = {2: "TWO", 3: "THREE", 4: "FOUR"}
    marked = " ".join(f"[PANEL-{i}] {clause}" for i, clause in enumerate(clauses, 1))
    return {"explanation": "", "prompt": f"[{words[len(clauses)]}-PANEL] together, {marked}"}


SINGLE = {"explanation": "", "prompt": "a fox", "image_id": "output_0001_fox"}


def test_one_picture_from_words(serve):
    server, planner = serve([counting(0, 1), SINGLE])
    plan = planner.plan(ChatRequest("a fox, please"), ())
    assert [step.panels for step in plan.steps] == [("a fox",)]  # no question about panels
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "tiny" and body["response_format"] == {"type": "json_object"}
    assert json.loads(body["messages"][1]["content"]) == {
        "instruction": "a fox, please",
        "input_image_count": 0,
    }


def test_three_pictures_from_one_are_drawn_in_turn(serve):
    answers = [
        description("a red fox"),
        counting(1, 3),
        prompting("fox one", "fox two", "fox three"),
        panels("a red fox", "fox one"),
        panels("a red fox", "fox one", "fox two"),
        panels("a red fox", "fox one", "fox two", "fox three"),
    ]
    server, planner = serve(answers)
    plan = planner.plan(ChatRequest("three of it", (picture(1),)), ())
    assert [s.group for s in plan.steps] == [
        Group((0,), (1,)),
        Group((0, 1), (2,)),
        Group((0, 1, 2), (3,)),
    ]
    assert plan.steps[0].overall == "together"
    assert plan.inputs[0].description == "a red fox"
    last = json.loads(server.asked[-1][2]["messages"][1]["content"])
    assert list(last["panels"]) == ["panel_1", "panel_2", "panel_3", "panel_4"]


def test_pictures_travel_as_small_jpegs_in_rgb(serve):
    server, planner = serve([description("a", "b"), counting(2, 1), prompting("c"), panels(*"abc")])
    given = (picture(1, mode="RGBA"), picture(2, size=(4096, 64)))
    planner.plan(ChatRequest("mix them", given), ())
    content = server.asked[0][2]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    sizes = []
    for part in content[:2]:
        head, data = part["image_url"]["url"].split(",")
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/jpeg;base64" and sent.mode == "RGB"
        sizes.append(sent.size)
    assert sizes == [(8, 8), (2048, 32)]
    assert isinstance(server.asked[1][2]["messages"][1]["content"], str)  # counting sees none


def test_earlier_pictures_are_chosen_and_keep_their_descriptions(serve):
    choice = {"explanation": "", "image_ids": ["picture_0002_given"]}
    server, planner = serve(
        [choice, counting(1, 1), prompting("blue hen"), panels("a hen", "blue hen")]
    )
    memory = (picture(1, "a fox"), picture(2, "a hen"))
    plan = planner.plan(ChatRequest("make the second one blue"), memory)
    assert plan.sources == (2,) and plan.inputs[0].description == "a hen"
    assert server.questions()[0] == "You find out"
    assert not any(question == "You describe the given" for question in server.questions())


def test_only_pictures_that_nobody_described_are_looked_at(serve):
    choice = {"explanation": "", "image_ids": ["picture_0001_given"]}
    answers = [choice, description("a hen"), counting(2, 1), prompting("both"), panels(*"abc")]
    server, planner = serve(answers)
    plan = planner.plan(ChatRequest("join them", (picture(2),)), (picture(1, "a fox"),))
    assert [item.description for item in plan.inputs] == ["a fox", "a hen"]
    kinds = [part["type"] for part in server.asked[1][2]["messages"][1]["content"]]
    assert kinds == ["image_url", "text"]
    prompt = json.loads(server.asked[3][2]["messages"][1]["content"][-1]["text"])
    assert prompt["descriptions"]["input_images_overview"] == "seen"


def test_an_invalid_reply_is_handed_back_with_its_sentence(serve):
    wrong = counting(3, 1)
    server, planner = serve([wrong, "no JSON", counting(0, 1), SINGLE])
    planner.plan(ChatRequest("a fox"), ())
    first, second = server.asked[1][2]["messages"], server.asked[2][2]["messages"]
    assert [turn["role"] for turn in first] == ["system", "user", "assistant", "user"]
    assert json.loads(first[2]["content"]) == wrong
    assert "input_image_count must repeat the 0 of the request, got 3" in first[3]["content"]
    assert "no complete JSON object" in second[3]["content"] and len(second) == 4


@pytest.mark.parametrize("failures", [0, 1, 4])
def test_up_to_five_replies_to_a_question(serve, failures: int):
    server, planner = serve([{}] * failures + [counting(0, 1), SINGLE])
    planner.plan(ChatRequest("a fox"), ())
    assert len(server.asked) == failures + 2


def test_five_invalid_replies_end_it(serve):
    server, planner = serve([{}] * 5)
    with pytest.raises(PlannerError, match=r"in 5 attempts; .* lacks 'explanation'"):
        planner.plan(ChatRequest("a fox"), ())
    assert len(server.asked) == 5


def test_a_server_that_stumbles_is_asked_again(serve):
    server, planner = serve([(500, b"oops", {}), (429, b"slow", {}), counting(0, 1), SINGLE])
    assert planner.plan(ChatRequest("a fox"), ()).outputs[0].description == "a fox"
    assert len(server.asked) == 4


def test_a_server_that_stays_down_is_named(serve):
    server, planner = serve([(503, b"busy", {})] * 3, retries=2)
    with pytest.raises(PlannerError, match=r"completions answered 503: busy \(request 3\)"):
        planner.plan(ChatRequest("a fox"), ())
    assert len(server.asked) == 3


def test_a_refusal_is_not_repeated_and_the_key_is_not_shown(serve, capsys, caplog):
    server, planner = serve([(401, f"bad key {KEY}".encode(), {})])
    with pytest.raises(PlannerError, match=r"answered 401: bad key \*\*\*") as caught:
        planner.plan(ChatRequest("a fox"), ())
    assert len(server.asked) == 1
    shown = f"{caught.value}{caught.value.__cause__}{caught.value.__context__}{planner!r}"
    captured = capsys.readouterr()
    assert KEY not in shown + captured.out + captured.err + caplog.text
    assert not any(KEY in str(value) for value in vars(planner).values())


def test_a_slow_server(serve):
    def sleep(handler: Any) -> dict:
        time.sleep(0.6)
        return counting(0, 1)

    server, planner = serve([sleep, sleep], timeout=0.15, retries=1)
    with pytest.raises(PlannerError, match=r"did not answer in 0\.15 s \(request 2\)"):
        planner.plan(ChatRequest("a fox"), ())
    assert len(server.asked) == 2


def test_a_redirect_does_not_carry_the_key_away(serve):
    other, _ = serve([counting(0, 1)])
    _, planner = serve([(302, b"", {"Location": f"{other.url}/chat/completions"})])
    with pytest.raises(PlannerError, match="answered 302"):
        planner.plan(ChatRequest("a fox"), ())
    assert other.asked == []


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b'{"choices": []}', b"[]"])
def test_another_kind_of_server(serve, answer: bytes):
    _, planner = serve([answer])
    with pytest.raises(PlannerError, match="is it an OpenAI-compatible endpoint"):
        planner.plan(ChatRequest("a fox"), ())


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    planner = OpenAIPlanner("m", "http://127.0.0.1:9", key_variable=None, retries=0)
    with pytest.raises(PlannerError, match=r"failed \(.*refused.*\) \(request 1\)"):
        planner.plan(ChatRequest("a fox"), ())


def test_keys_come_from_the_environment_alone(serve, monkeypatch):
    server, planner = serve([counting(0, 1), SINGLE], key_variable=None)
    planner.plan(ChatRequest("a fox"), ())
    assert "Authorization" not in server.asked[0][1]
    monkeypatch.delenv("CHAT_KEY")
    with pytest.raises(PlannerError, match="environment variable CHAT_KEY holds no key"):
        OpenAIPlanner("m", key_variable="CHAT_KEY").plan(ChatRequest("a fox"), ())
    monkeypatch.setenv("CHAT_KEY", KEY)
    lan = OpenAIPlanner("m", "http://192.0.2.1/v1", key_variable="CHAT_KEY")
    with pytest.raises(PlannerError, match="unencrypted"):
        lan.plan(ChatRequest("a fox"), ())


def test_bodies_follow_the_settings(serve):
    settings = {"json_mode": False, "extra": {"temperature": 0, "max_tokens": None, "seed": 1}}
    server, planner = serve([counting(0, 1), SINGLE], **settings)
    planner.plan(ChatRequest("a fox"), ())
    assert set(server.asked[0][2]) == {"model", "messages", "temperature", "seed"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "ftp://x"}, "http:// or https://"),
        ({"timeout": 0}, "timeout is above 0"),
        ({"attempts": 0}, "attempts at least 1"),
    ],
)
def test_settings_are_checked(settings: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        OpenAIPlanner("m", **settings)


def test_a_model_that_does_not_see_is_told(serve):
    _, planner = serve([], sees=False)
    with pytest.raises(PlannerError, match="sees no pictures and nobody said what picture 1 shows"):
        planner.plan(ChatRequest("it in blue", (picture(1),)), ())
    answers = [counting(1, 1), prompting("blue"), panels("a red thing", "blue")]
    server, planner = serve(answers, sees=False, describe=lambda image: "a red thing")
    plan = planner.plan(ChatRequest("it in blue", (picture(1),)), ())
    assert plan.inputs[0].description == "a red thing"
    assert all(isinstance(b["messages"][1]["content"], str) for _, _, b in server.asked)


def test_articles_are_asked_for_in_plain_text_and_checked(serve):
    good = "# Fox\n\n![fox](output_0001_fox.png)\n"
    server, planner = serve([counting(0, 1), SINGLE, "# Fox", good])
    plan = planner.plan(ChatRequest("an article about a fox"), ())
    assert plan.article and planner.write(plan) == good
    assert "response_format" not in server.asked[2][2]
    assert "never shows output_0001_fox.png" in server.asked[3][2]["messages"][3]["content"]


# transformers


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A random chat model whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


class Script(LogitsProcessor):
    """Lets a model say nothing but the next of some texts, through its own `generate`."""

    def __init__(self, tokenizer: Any, replies: list[str]) -> None:
        ends = [tokenizer.eos_token_id]
        self.replies = [tokenizer.encode(text, add_special_tokens=False) + ends for text in replies]
        self.left: Iterator[int] = iter(())
        self.length = 0
        self.prompts: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.length or input_ids.shape[1] != self.length + 1:
            self.left = iter(self.replies.pop(0))
            self.prompts.append(input_ids[0])
        self.length = input_ids.shape[1]
        allowed = next(self.left)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, allowed] = 0
        return forced


def test_a_random_model_fails_with_a_sentence(tiny):
    planner = TransformersPlanner(*tiny, max_new_tokens=8, attempts=2)
    state = torch.random.get_rng_state()
    with pytest.raises(PlannerError, match=r"no usable reply in 2 attempts; .*no complete JSON"):
        planner.plan(ChatRequest("a fox"), ())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM], ids=["system", "no-system"])
def test_what_a_model_says_is_parsed(tiny, template: str):
    model, tokenizer = tiny
    tokenizer.chat_template = template
    replies = [json.dumps(counting(0, 1)), f"Sure:\n```json\n{json.dumps(SINGLE)}\n```"]
    script = Script(tokenizer, replies)
    planner = TransformersPlanner(
        model,
        tokenizer,
        max_new_tokens=256,
        generation={"logits_processor": LogitsProcessorList([script])},
    )
    plan = planner.plan(ChatRequest("a fox, please"), ())
    tokenizer.chat_template = TEMPLATE
    assert plan.outputs[0].description == "a fox"
    asked = tokenizer.decode(script.prompts[0])
    assert "You decide how many pictures" in asked and "a fox, please" in asked
    assert asked.endswith("<assistant>")


def test_a_reply_that_does_not_fit_is_announced(tiny):
    planner = TransformersPlanner(*tiny, max_new_tokens=8000)
    with pytest.raises(PlannerError, match="LlamaForCausalLM has room for 8192"):
        planner.plan(ChatRequest("a fox"), ())


def test_a_model_without_a_chat_template_is_refused(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        TransformersPlanner(model, tokenizer)
    tokenizer.chat_template = TEMPLATE


def test_a_vision_language_model_is_shown_the_pictures():
    """The embedded one answers in its own small language, so planning ends with a sentence."""
    model, processor = mmattn.mini.load("vlm")
    planner = TransformersPlanner(model, processor, max_new_tokens=8, attempts=1)
    assert planner.sees
    with pytest.raises(PlannerError):
        planner.plan(ChatRequest("make it blue", (picture(1, size=(64, 64)),)), ())
