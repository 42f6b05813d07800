"""A-STAR on whole diffusers pipelines: latents follow the gradient of losses on attention maps.

```python
guided = AttentionGuidance(pipe, AStar(words=("circle", "square")))
out = guided("a red circle left of a blue square", num_inference_steps=20)
out.images, guided.trace[0].segregation
```
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import mmattn
from mmattn.methods._word_maps import Places, memories, word_places
from mmattn.methods.astar import AStar, regions
from mmattn.runs import Run


@dataclass(frozen=True)
class GuidedStep:
    """What one guided step did; a number per row of the batch.

    Args:
        step: index of the denoising step.
        segregation, retention: both losses before the latents moved, unweighted.
        moved: length of the move over the length of the latents.
    """

    step: int
    segregation: tuple[float, ...]
    retention: tuple[float, ...]
    moved: tuple[float, ...]


class AttentionGuidance:
    """A diffusers pipeline whose latents are moved before every step, as A-STAR does.

    The pipeline's own loop runs unchanged. Before the first model call of a step the denoiser runs once
    more, with gradients, on the same input; the moved latents then go into the model calls of the step
    and into ``scheduler.step``. So nothing is delayed by a step, and pipelines without
    ``callback_on_step_end`` work as well. Guidance in one batch (the second half is the prompt's) and
    in two calls (the first one is the prompt's) are both known. A guided step costs one forward and one
    backward more; with guidance in one batch the extra forward has the whole batch.

    Args:
        pipe: a pipeline with a `scheduler` and a `transformer` or `unet`.
        method: what to minimise.
        others: further methods to attach at the same time.

    Attributes:
        trace: what the guided steps of the last call did.
    """

    def __init__(self, pipe: Any, method: AStar, others: Sequence[Any] = ()) -> None:
        self.pipe, self.method, self.others = pipe, method, tuple(others)
        self.trace: list[GuidedStep] = []

    def __call__(
        self,
        prompt: str | Sequence[str],
        *args: Any,
        words: Sequence[Sequence[str]] | None = None,
        layout: torch.Tensor | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Draw; arguments as for the pipeline, and three more.

        Args:
            prompt: one prompt or several.
            words: the concepts of every prompt, in place of ``method.words``; as many for each.
            layout: ``[prompts, concepts, T, Y, X]`` regions to hold the concepts in, in place of those of
                the step before; resized to the maps.
            seed: for random directions; nothing else draws numbers.

        Returns:
            What the pipeline returns.

        Raises:
            ConfigError: no words, a word that the prompt does not have, or a scheduler that would undo
                the moves.
            UnsupportedCall: the model input is not the latents, once or twice.
        """
        self.trace = []
        if self.method.passive:
            with mmattn.attach(self.pipe, self.others) if self.others else nullcontext():
                return self.pipe(prompt, *args, **kwargs)
        _check_scheduler(self.pipe.scheduler)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        copies = int(kwargs.get("num_images_per_prompt") or 1)
        places = [row for row in self._places(prompts, words) for _ in range(copies)]
        if layout is not None:
            layout = layout.repeat_interleave(copies, 0)
        with mmattn.attach(self.pipe, [self.method, *self.others]) as session:
            guide = _Guide(self.pipe, self.method, session, places, layout, seed)
            with guide.installed():
                out = self.pipe(prompt, *args, **kwargs)
        self.trace = guide.trace
        return out

    def _places(
        self, prompts: Sequence[str], words: Sequence[Sequence[str]] | None
    ) -> list[Places]:
        if words is None and self.method.tokens:
            return [self.method.tokens] * len(prompts)
        named = [self.method.words] * len(prompts) if words is None else [tuple(w) for w in words]
        if len(named) != len(prompts) or len({len(row) for row in named}) != 1 or not named[0]:
            raise mmattn.ConfigError(
                f"every prompt needs equally many words, at least one; got {named} for "
                f"{len(prompts)} prompts. Pass words=, or AStar(words=...)."
            )
        return [word_places(self.pipe, p, w) for p, w in zip(prompts, named, strict=True)]


class _Guide:
    """The moves of one pipeline call."""

    def __init__(
        self,
        pipe: Any,
        method: AStar,
        session: mmattn.Session,
        places: list[Places],
        layout: torch.Tensor | None,
        seed: int,
    ) -> None:
        self.scheduler, self.method, self.session = pipe.scheduler, method, session
        self.places, self.layout = places, layout
        self.generator = torch.Generator().manual_seed(seed)
        self.trace: list[GuidedStep] = []
        self.step: int | None = None
        self.move: torch.Tensor | None = None  # of the latents, in this step
        self.scale = 1.0  # from latents to model input, in this step
        self.before: torch.Tensor | None = None  # regions of the step before

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks on the denoisers, and the scheduler's step with moved latents."""
        hooks = [
            run.root.module.register_forward_pre_hook(
                functools.partial(self._before_call, run), with_kwargs=True
            )
            for run in self.session.runs
        ]
        own, stock = self.scheduler.__dict__.get("step"), self.scheduler.step
        self.scheduler.__dict__["step"] = self._stepping(stock)
        try:
            yield
        finally:
            del self.scheduler.__dict__["step"]
            if own is not None:  # somebody else's wrapper
                self.scheduler.step = own
            for hook in hooks:
                hook.remove()

    def _stepping(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if self.move is not None:
                sample = bound.arguments["sample"]
                if sample.shape != self.move.shape:
                    raise mmattn.UnsupportedCall(
                        f"The latents have shape {list(sample.shape)}, but the model input had "
                        f"{list(self.move.shape)} per prompt; AttentionGuidance needs the latents alone "
                        "as the model input."
                    )
                bound.arguments["sample"] = sample + self.move.to(sample.dtype)
                self.move = None
            return stock(*bound.args, **bound.kwargs)

        return step

    def _before_call(self, run: Run, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        clock = self.session.clock
        for memory in memories(self.session, AStar):
            memory["watch"] = None
        if clock.index != self.step:
            self.step, self.move = clock.index, None
            if self.method.phase(clock.index, clock.total):
                self._find_move(run, module, args, kwargs)
        if self.move is None:
            return None
        x = _model_input(args, kwargs)
        added = (self.move * self.scale).to(x.dtype)
        copies = x.shape[0] // added.shape[0]
        return _with_input(args, kwargs, x + torch.cat([added] * copies))

    def _find_move(self, run: Run, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        x, count = _model_input(args, kwargs), len(self.places)
        if x.shape[0] not in (count, 2 * count):
            raise mmattn.UnsupportedCall(
                f"The model input has {x.shape[0]} rows for {count} pictures; AttentionGuidance knows "
                "one row per picture, or two with guidance in one batch."
            )
        clock, method = self.session.clock, self.method
        assert clock.index is not None and clock.total is not None
        rows = slice(x.shape[0] - count, None)
        watch = method.watch(self.places, rows)
        for memory in memories(self.session, AStar):
            memory["watch"] = watch
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            given, named = _with_input(args, kwargs, x)
            module.forward(*given, **named)
            assert run.layout is not None
            maps = watch.maps(method.resolution, pyramid=run.layout.pyramid)
            target = self.before if self.layout is None else _resized(self.layout, maps)
            apart, kept = method.loss(maps, target)
            loss = method.segregation * apart + method.retention * kept
            # A single concept has no regions to stay in before it was seen once, and no gradient.
            gradient = (
                torch.autograd.grad(loss.sum(), x)[0] if loss.requires_grad else 0 * x.detach()
            )
        for memory in memories(self.session, AStar):
            memory["watch"] = None
        self.scale = _input_scale(self.scheduler, clock.index)
        gradient = gradient[rows].float() * self.scale
        latents = x.detach()[rows].float() / self.scale
        self.move = -method.step_size(clock.index, clock.total) * self._direction(gradient, latents)
        self.before = regions(maps, method.tau)
        length, size = _length(self.move), _length(latents)
        self.trace.append(
            GuidedStep(
                clock.index,
                tuple(apart.tolist()),
                tuple(kept.tolist()),
                tuple((length / size).flatten().tolist()),
            )
        )

    def _direction(self, gradient: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        length = _length(gradient)
        if self.method.random:
            drawn = torch.randn(gradient.shape, generator=self.generator).to(gradient.device)
            gradient = drawn * (length / _length(drawn))
        if self.method.unit == "gradient":
            return gradient
        return gradient / torch.where(length > 0, length, 1) * _length(latents)


def _model_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    if not isinstance(x, torch.Tensor):
        raise mmattn.UnsupportedCall(
            f"The model input is a {type(x).__name__}; AttentionGuidance needs one tensor of latents."
        )
    return x


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else "sample"
    return args, {**kwargs, name: x}


def _input_scale(scheduler: Any, index: int) -> float:
    """By what the scheduler multiplies latents before the model sees them."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[index]))


def _length(x: torch.Tensor) -> torch.Tensor:
    """Euclidean length of every row, ``[B, 1, ...]``."""
    length: torch.Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return length.view(-1, *[1] * (x.ndim - 1))


def _resized(layout: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(layout.to(maps), maps.shape[2:]) > 0.5


def _check_scheduler(scheduler: Any) -> None:
    if hasattr(scheduler, "last_sample"):
        raise mmattn.ConfigError(
            f"{type(scheduler).__name__} corrects its last step from the latents it remembers, which "
            "would undo every move. Give the pipeline a scheduler without a corrector, such as "
            "FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )
