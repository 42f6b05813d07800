"""Choosing back ends, and joining parts of a softmax."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from mmattn_kernels import BackendUnavailable, _backends, merge
from mmattn_kernels._backends import Backend, Op, Problem
from oracles import dense, gradients, loss_of, random_qkv


def problem(**changes) -> Problem:
    q = torch.empty(1, 2, 8, 16)
    return Problem(**{**Problem.of(q, q, q).__dict__, **changes})


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(_backends, "REGISTRY", {})
    monkeypatch.setattr(_backends, "_told", set())
    return Op(
        "test_op",
        Backend("fast", lambda p: "only even heads" if p.heads % 2 else None, lambda: "fast"),
        Backend("torch", _backends.always, lambda: "torch", lambda: "torch backward"),
        Backend("slow", _backends.always, lambda: "slow", lambda: "slow backward", automatic=False),
    )


def test_the_first_that_can_run_is_chosen_and_said_once(op, caplog):
    with caplog.at_level(logging.INFO, "mmattn_kernels"):
        assert op.choose("auto", problem()).name == "fast"
        assert op.choose("auto", problem(heads=3)).name == "torch"
        assert op.choose("auto", problem(heads=5)).name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "test_op on cpu: fast",
        "test_op on cpu: torch (fast: only even heads)",
    ]


def test_a_name_forces_or_raises(op):
    assert op.choose("slow", problem()).name == "slow"
    with pytest.raises(BackendUnavailable, match="'fast': only even heads"):
        op.choose("fast", problem(heads=3))
    with pytest.raises(ValueError, match=r"'quick'.*\['auto', 'fast', 'torch', 'slow'\]"):
        op.choose("quick", problem())
    assert op.explain(problem(heads=3)) == {"fast": "only even heads", "torch": None, "slow": None}


def test_a_backward_is_found_for_a_forward_without_one(op):
    assert op.choose_backward("fast", problem())() == "torch backward"
    assert op.choose_backward("slow", problem())() == "slow backward"


def test_plain_torch_on_a_gpu_is_never_silent(op, monkeypatch):
    cuda = problem(heads=3, device=torch.device("cuda"))
    with pytest.warns(UserWarning, match="runs as plain torch on the GPU"):
        op.choose("auto", cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.choose("auto", cuda)  # said once
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setenv("MMATTN_STRICT", "1")
    with pytest.raises(BackendUnavailable, match="only even heads"):
        op.choose("auto", cuda)


def test_the_interpreter_is_never_chosen_by_itself():
    q, k, v = random_qkv(1, 2, 8, 8, 16, dtype=torch.float32)
    op = _backends.REGISTRY["attention_with_column_mass"]
    assert _backends.interpreting() and op.choose("triton", Problem.of(q, k, v)).name == "triton"
    assert op.choose("auto", Problem.of(q, k, v)).name == "torch"
    with pytest.raises(BackendUnavailable, match="float64 is not one of"):
        op.choose("triton", Problem.of(*(t.double() for t in (q, k, v))))


def test_every_op_says_what_it_can_run():
    import mmattn_kernels

    assert len(_backends.REGISTRY) >= 8
    for name, registered in _backends.REGISTRY.items():
        # The masses of groups are a part of `grouped_attention`.
        assert name == "group_masses" or callable(getattr(mmattn_kernels, name))
        extra = {"groups": 3, "grid": (8,), "window": (3,), "patterns": False}
        reasons = registered.explain(problem(extra=extra))
        assert reasons["torch"] is None and reasons["reference"] is None
        assert set(reasons) >= {"triton", "torch", "reference"}


def test_merge_equals_one_softmax():
    q, k, v = random_qkv(1, 2, 20, 33, 16, grad=True)
    masks = torch.rand(3, 1, 2, 20, 33) < 0.2
    masks[1] &= ~masks[0]
    masks[2] &= ~(masks[0] | masks[1])
    masks[:, :, :, 0] = False  # a row that no part sees
    masks[1] = False  # a part without any key
    outs, lses = zip(*(dense(q, k, v, mask)[:2] for mask in masks), strict=True)
    out, lse = merge(list(outs), list(lses))
    want, want_lse, _ = dense(q, k, v, masks.any(0))
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)
    got = gradients(loss_of(out, lse), q, k, v)
    for g, w in zip(got, gradients(loss_of(want, want_lse), q, k, v), strict=True):
        torch.testing.assert_close(g, w, atol=1e-12, rtol=0)


def test_merge_needs_as_many_lses_as_outputs():
    with pytest.raises(ValueError, match="got 1 and 0"):
        merge([torch.zeros(1, 1, 1, 1)], [])
