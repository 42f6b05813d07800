"""OPERA against a literal search on whole attention matrices, without caches, one beam after the other."""

import math
from collections import Counter

import pytest
import torch
import transformers_zoo as zoo
from decoder_oracle import alone, sharpen
from host_contract import distance

import mmattn
from mmattn import Opera, opera_search
from mmattn.methods.opera import Trust

KNOBS = {"candidates": 5, "scale": 60.0, "penalty": 2.0}
PLAIN = {**zoo.GREEDY, "eos_token_id": None}


class Literal:
    """The definition. Every look at the model is a run of the whole prompt and answer, in eager mode."""

    def __init__(self, model, call, candidates=5, scale=50.0, penalty=1.0, **knobs):
        self.model, self.call = model, call
        self.candidates, self.scale, self.penalty = candidates, scale, penalty
        self.threshold = knobs.get("threshold", 10**9)
        self.rollbacks = knobs.get("rollbacks", 5)
        self.seen, self.went_back = {}, []

    def run(self, answer):
        """Logits ``[V]`` after `answer`, and the last layer's attention, largest over heads."""
        if answer not in self.seen:
            mask = torch.nn.functional.pad(self.call["attention_mask"], (0, len(answer)), value=1)
            ids = torch.cat([self.call["input_ids"], torch.tensor([answer]).long().view(1, -1)], 1)
            image = torch.zeros_like(ids, dtype=torch.bool)  # an answer may hold the image's id
            image[:, : self.call["input_ids"].shape[1]] = self.call["input_ids"] == zoo.IMAGE
            with torch.no_grad():
                picture = self.model.get_image_features(self.call["pixel_values"]).pooler_output
                embeds = self.model.get_input_embeddings()(ids)
                found = self.model.model.language_model(
                    inputs_embeds=embeds.masked_scatter(image[..., None], torch.cat(list(picture))),
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    output_attentions=True,
                )
                logits = self.model.lm_head(found.last_hidden_state[0, -1])
            attention = found.attentions[-1][0].max(0).values
            real = mask[0].bool()
            rows = attention / attention.sum(-1, keepdim=True)
            self.seen[answer] = logits, rows[real][:, real], image[0][real]
        return self.seen[answer]

    def ruled(self, answer, banned=()):
        """Logits of the candidates after their penalties, and the place of the largest score."""
        logits = self.run(answer)[0].clone()
        logits[list(banned)] = -math.inf
        values, tokens = logits.topk(self.candidates)
        penalties, places = [], []
        for token in tokens.tolist():
            _, rows, image = self.run((*answer, token))
            size = len(answer) + 1
            block = (self.scale * rows[-size:, -size:]).double().tolist()
            scores = []
            for j in range(size):
                product = 1e-7
                for i in range(j, size):
                    product *= block[i][j]
                scores.append(product)
            places.append(scores.index(max(scores)))
            penalties.append(max(scores))
            if size <= 10:
                penalties[-1] = -float(rows[-1][image].sum())
        new = values.double() - self.penalty * torch.tensor(penalties, dtype=torch.float64)
        counts = Counter(places)
        place = min(p for p in counts if counts[p] == max(counts.values()))
        return dict(zip(tokens.tolist(), new.log_softmax(-1).tolist(), strict=True)), place

    def search(self, beams, length):
        """``(score, answer)`` of every beam at the end, best first; scores are means over tokens."""
        now = [((), 0.0, ())]
        before, picked, banned, tries = {}, {}, {}, Counter()
        step = 0
        while step < length:
            before[step] = now
            tested = [self.ruled(b[0], banned.get((step, n), ())) for n, b in enumerate(now)]
            histories = [(*b[2], place) for b, (_, place) in zip(now, tested, strict=True)]
            counts = Counter(history[-1] for history in histories)
            place = min(p for p in counts if counts[p] == max(counts.values()))
            if place >= 10 and all(h.count(place) > self.threshold for h in histories):
                options = [p for p in (place + 1, place) if p < step and tries[p] < self.rollbacks]
                if options:
                    to = options[0]
                    tries[to] += 1
                    self.went_back.append((step, to))
                    for key in [k for k in banned if k[0] > to]:
                        del banned[key]
                    for parent, token in picked[to]:
                        banned[to, parent] = (*banned.get((to, parent), ()), token)
                    step, now = to, before[to]
                    continue
            grown = []
            for n, (beam, (scores, _)) in enumerate(zip(now, tested, strict=True)):
                for token, value in scores.items():
                    grown.append((beam[1] + value, n, token))
            grown = sorted(grown, reverse=True)[:beams]
            picked[step] = [(n, token) for _, n, token in grown]
            now = [((*now[n][0], token), total, histories[n]) for total, n, token in grown]
            step += 1
        return [(total / length, answer) for answer, total, _ in now]


@pytest.fixture
def model():
    return sharpen(zoo.llava("eager", layers=2))


def beams(model, call, count, length, **kw):
    more = {"num_beams": count, "num_return_sequences": count, "max_new_tokens": length}
    with torch.no_grad():
        out = model.generate(
            **call, **{**PLAIN, **more, **kw}, return_dict_in_generate=True, output_scores=True
        )
    return out.sequences[:, call["input_ids"].shape[1] :], out.sequences_scores


@pytest.mark.parametrize("count", [1, 2, 5])
def test_beams_equal_the_literal_search(model, count):
    """Both rows of a padded batch, each against its own search, past the tenth token."""
    call, length = zoo.llava_call(), 13
    assert not call["attention_mask"].all()
    references = [Literal(model, alone(call, row), **KNOBS).search(count, length) for row in (0, 1)]
    stock = beams(model, call, count, length)[0] if count > 1 else None
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with mmattn.attach(model, Opera(**KNOBS)) as session:
            if count == 1:
                got = zoo.tokens(model, call, eos_token_id=None, max_new_tokens=length)
                got = got[:, call["input_ids"].shape[1] :]
            else:
                got, scores = beams(model, call, count, length)
            stats = session.stats
        assert stats.executed == stats.planned == 2
        assert 0 < stats.sites[-1].notes["overruled"] < 1
        for row, want in enumerate(references):
            for n in range(count):
                assert tuple(got[row * count + n].tolist()) == want[n][1]
                if count > 1:
                    assert abs(float(scores[row * count + n]) - want[n][0]) < 1e-4
    assert stock is None or not torch.equal(got, stock)


def test_every_logit_of_a_step(model):
    call, method = zoo.llava_call(), Opera(**KNOBS)
    with mmattn.attach(model, method), torch.no_grad():
        out = model.generate(
            **call,
            **{**PLAIN, "max_new_tokens": 12},
            return_dict_in_generate=True,
            output_logits=True,
        )
    far = 0.0
    for row in range(2):
        literal = Literal(model, alone(call, row), **KNOBS)
        answer = tuple(out.sequences[row, call["input_ids"].shape[1] :].tolist())
        for step in (0, 3, 9, 10, 11):
            want, _ = literal.ruled(answer[:step])
            got = out.logits[step][row]
            assert set(got.topk(5).indices.tolist()) == set(want)
            chance = got.log_softmax(-1)
            assert all(abs(float(chance[t]) - v) < 1e-4 for t, v in want.items())
            others = [t for t in range(len(got)) if t not in want]
            assert float(got[others].max()) < float(got[list(want)].min()) - 900
            plain = literal.run(answer[:step])[0][list(want)].log_softmax(-1)
            far = max(far, float((plain - chance[list(want)]).abs().max()))
    assert far > 0.1, "the penalty has to matter"


@pytest.mark.parametrize(("threshold", "rollbacks", "length"), [(2, 2, 18), (3, 5, 16)])
def test_retrospection_equals_the_literal_search(threshold, rollbacks, length):
    """Going back, choosing something else, and going back again; beams, padding, both back ends."""
    call = {k: v[1:] for k, v in zoo.llava_call().items()}
    assert not call["attention_mask"].all(), "the row has to be padded"
    model, generator = zoo.llava("eager", layers=2), torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "language_model" in name and weight.ndim > 1:
            std = 1.0 if "embed" in name else 0.02
            weight.data = torch.randn(weight.shape, generator=generator) * std
    sharpen(model, 60.0)
    knobs = {"candidates": 5, "scale": 30.0, "penalty": 2.0}
    more = {"threshold": threshold, "rollbacks": rollbacks}
    literal = Literal(model, call, **knobs, **more)
    want = literal.search(3, length)
    places = [to for _, to in literal.went_back]
    assert len(places) > 1, places
    assert max(Counter(places).values()) <= rollbacks
    assert Literal(model, call, **knobs).search(3, length) != want, "going back has to matter"
    for implementation in ("sdpa",) if length < 18 else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with mmattn.attach(model, Opera(**knobs, **more)) as session:
            got, scores = beams(model, call, 3, length, custom_generate=opera_search(session))
            assert session.stats.sites[-1].notes["rollbacks"] == len(places)
        assert [tuple(row.tolist()) for row in got] == [answer for _, answer in want]
        assert all(abs(float(s) - w) < 1e-4 for s, (w, _) in zip(scores, want, strict=True))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_without_going_back_it_is_transformers_search(model, count, early):
    call = alone(zoo.llava_call(), 1)
    seen = Counter(beams(model, call, 4, 8)[0].flatten().tolist())
    ends = [token for token, _ in seen.most_common(2)]  # so that some beams end early
    more = {"eos_token_id": ends, "early_stopping": early, "num_return_sequences": 2}
    method = Opera(**KNOBS, threshold=100)
    with mmattn.attach(model, method) as session:
        want, scores = beams(model, call, count, 8, **more, length_penalty=0.7)
        search = opera_search(session)
        got, numbers = beams(
            model, call, count, 8, **more, length_penalty=0.7, custom_generate=search
        )
        plain = zoo.tokens(model, call, num_beams=count, custom_generate=search)
        assert torch.equal(plain, zoo.tokens(model, call, num_beams=count))
    assert torch.equal(got, want) and distance(numbers, scores) < 1e-6


def test_other_models():
    for name, knobs in (("qwen2.5-vl", {}), ("instructblip", {})):
        build, make, _ = zoo.ALL[name]
        model = build()
        call = make(model)
        stock = zoo.tokens(model, call, num_beams=3, eos_token_id=None, max_new_tokens=12)
        method = Opera(**{**KNOBS, **knobs, "penalty": 50.0})
        with mmattn.attach(model, method) as session:
            got = zoo.tokens(model, call, num_beams=3, eos_token_id=None, max_new_tokens=12)
            stats = session.stats
        assert stats.executed == stats.planned == 2 and not torch.equal(got, stock)


def test_pruned_prompts_keep_their_columns(model):
    """Beside pruning, the penalty is that of the shorter prompt."""
    call, prune = zoo.llava_call(), mmattn.UniformPrune(keep=8)
    with mmattn.attach(model, [prune, Opera(**KNOBS)]) as session:
        both = beams(model, call, 2, 12)[0]
        single = beams(model, alone(call, 1), 2, 12, custom_generate=opera_search(session))[0]
    assert torch.equal(single, both[2:])
    with mmattn.attach(model, prune):
        assert not torch.equal(both, beams(model, call, 2, 12)[0])


def test_a_penalty_of_zero_changes_nothing(model):
    call = zoo.llava_call()
    stock, tokens = zoo.logits(model, call), zoo.tokens(model, call, num_beams=3)
    with mmattn.attach(model, Opera(penalty=0.0)) as session:
        assert torch.equal(zoo.logits(model, call), stock)
        assert torch.equal(zoo.tokens(model, call, num_beams=3), tokens)
        with pytest.raises(mmattn.ConfigError, match="penalty above 0"):
            opera_search(session)
    with mmattn.attach(model, Opera(**KNOBS)):
        changed = zoo.logits(model, call)
        assert torch.equal(changed[:, :-1], stock[:, :-1])
        assert not torch.equal(changed[:, -1], stock[:, -1])
    assert torch.equal(zoo.tokens(model, call, num_beams=3), tokens)


def test_summaries():
    trust = Trust(None, 0, 0, torch.zeros(2, 3), torch.tensor([[4, 7, 7, 7], [7, 7, 7, 9]]))
    assert trust.summary(2, 512) == 7  # of 7 and 9 in the last step, the smaller
    assert trust.summary(3, 512) is None and trust.summary(2, 3) is None
    trust.reorder(torch.tensor([1, 1]))
    assert trust.places.tolist() == [[7, 7, 7, 9]] * 2
    assert trust.summary(0, 512) == 9 and trust.summary(1, 512) is None


def test_what_it_refuses(model):
    call = zoo.llava_call()
    bad = [{"candidates": 0}, {"scale": 0.0}, {"penalty": -1.0}, {"threshold": 0}, {"window": 0}]
    for settings in [*bad, {"rollbacks": -1}, {"candidates": 2.5}]:
        with pytest.raises(mmattn.ConfigError):
            Opera.from_dict(settings)
    assert Opera.from_dict(Opera(**KNOBS).to_dict()) == Opera(**KNOBS)
    with pytest.raises(mmattn.NoSiteError):
        mmattn.attach(zoo.llama(), Opera())
    for other in (mmattn.VCD(), mmattn.PAI(), mmattn.VHR()):
        with (
            mmattn.attach(model, [other, Opera()]),
            pytest.raises(mmattn.UnsupportedCall, match="one at a time"),
        ):
            zoo.tokens(model, call)
    with torch.no_grad(), mmattn.attach(model, Opera()) as session:
        with pytest.raises(mmattn.UnsupportedCall, match="use_cache"):
            model(**call, use_cache=False)
        search = opera_search(session)
        with pytest.raises(mmattn.UnsupportedCall, match="one prompt at a time"):
            zoo.tokens(model, call, num_beams=2, custom_generate=search)
        one = alone(call, 1)
        with pytest.raises(mmattn.UnsupportedCall, match="does not sample"):
            zoo.tokens(model, one, num_beams=2, do_sample=True, custom_generate=search)
        first, second = (model(**call, use_cache=True) for _ in range(2))
        mask = torch.nn.functional.pad(call["attention_mask"], (0, 2), value=1)
        step = {"input_ids": torch.tensor([[7, 3], [8, 3]]), "attention_mask": mask}
        with pytest.raises(mmattn.UnsupportedCall, match="one token at a time"):
            model(**step, cache=second.cache)
        with pytest.raises(mmattn.UnsupportedCall, match="has not seen"):
            model(**step, cache=first.cache)
    with pytest.raises(mmattn.ConfigError, match="Opera attached"):
        opera_search(mmattn.attach(zoo.llava(), "identity"))
