"""Text to video with Wan and sparse attention: `WanPipeline` with two more arguments.

By import, or from diffusers without one:

```python
from mmattn_pipelines.wan_sparse import WanSparsePipeline

pipe = WanSparsePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
pipe = WanSparsePipeline.from_pipe(wan_pipeline)
pipe = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline="path/to/wan_sparse.py", trust_remote_code=True
)
out = pipe("a red circle moving up", sparse=VMoBA(topk=3))
out.frames, out.sparsity.density
```
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Self

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

import mmattn
from mmattn.config import recipe_from
from mmattn.registry import method_from

AUTO = "auto"
"""The default of `sparse`: VMoBA with the settings that fit the resolution."""

PRESETS = {(21, 30, 52): "wan_480p", (21, 45, 80): "wan_720p"}
"""Token grids, frames x rows x columns, for which VMoBA's paper has training-free settings."""


@dataclass
class WanSparsePipelineOutput(WanPipelineOutput):
    """What `WanSparsePipeline` returns.

    Args:
        frames: the clips, as `WanPipelineOutput` has them.
        sparsity: densities, calls and dense fall-backs of this call; None where nothing was attached.
    """

    sparsity: mmattn.Stats | None = None


class WanSparsePipeline(WanPipeline):
    """Text to video with Wan, with a sparse attention method attached for the duration of a call.

    Everything `WanPipeline` takes and returns is unchanged; the transformers are as they were before
    when a call returns, fails or is interrupted. Saved folders are those of Wan: load one with
    ``WanSparsePipeline.from_pretrained``, or with `DiffusionPipeline` and ``custom_pipeline``.
    """

    _session: mmattn.Session | None = None

    def __call__(
        self, *args: Any, sparse: Any = AUTO, report: bool = False, **kwargs: Any
    ) -> WanSparsePipelineOutput | tuple[Any, ...]:
        """Draw clips; arguments as for `WanPipeline`, and two more.

        Args:
            sparse: what to attach: a `mmattn.Method` (or several in a list), a registered name, a mapping
                of settings with its ``name``, a recipe (`mmattn.load`), or the path of a ``.toml`` or
                ``.json`` recipe. None draws as `WanPipeline` does, bitwise. ``"auto"`` takes what
                `enable_sparse` attached, or else VMoBA: in its paper's training-free settings at 81 x 480
                x 832 and 81 x 720 x 1280, in its defaults at other sizes.
            report: write the table of sites to stderr afterwards.

        Returns:
            `WanSparsePipelineOutput`; with ``return_dict=False`` the tuple of its fields that are not None.

        Raises:
            ConfigError: for an unknown method, setting or recipe, or for `sparse` while `enable_sparse`
                holds; before anything is encoded or denoised.
            NoSiteError, ConflictError: the method fits no site, or the model is attached already.
            TypeError: for an argument that `WanPipeline` does not know.
        """
        stock = inspect.signature(WanPipeline.__call__).bind(self, *args, **kwargs)
        stock.apply_defaults()
        as_dict, stock.arguments["return_dict"] = stock.arguments["return_dict"], True
        with self._attached(sparse, self.token_grid(**_size(stock.arguments))) as session:
            frames = WanPipeline.__call__(*stock.args, **stock.kwargs).frames
            stats = None if session is None else session.stats
            if report and session is not None:
                sys.stderr.write(session.report() + "\n")
        output = WanSparsePipelineOutput(frames=frames, sparsity=stats)
        return output if as_dict else output.to_tuple()

    def enable_sparse(self, sparse: Any) -> mmattn.Session:
        """Attach a method until `disable_sparse`, for loops that should not attach anew at every call.

        Args:
            sparse: as for a call, but neither None nor ``"auto"``, which needs to know a resolution.

        Returns:
            The session. Its numbers start anew at every call of the pipeline.

        Raises:
            ConfigError, NoSiteError, ConflictError: as for a call; also for a second `enable_sparse`.
        """
        if sparse is None or sparse == AUTO:
            raise mmattn.ConfigError(
                f"enable_sparse needs a method to attach, got {sparse!r}; name one, such as 'vmoba'"
            )
        self._session = mmattn.attach(self, _methods(sparse))
        return self._session

    def disable_sparse(self) -> None:
        """Take off what `enable_sparse` attached, bitwise; nothing happens if there is nothing."""
        session, self._session = self._session, None
        if session is not None:
            session.detach()

    def token_grid(
        self, height: int, width: int, num_frames: int, latents: Any = None
    ) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens that a clip of this size in pixels has, as Wan rounds it."""
        model = self.transformer if self.transformer is not None else self.transformer_2
        t, y, x = model.config.patch_size
        if latents is not None:
            frames, rows, columns = latents.shape[2:]
            return frames // t, rows // y, columns // x
        space, time = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        return (num_frames // time + 1) // t, height // (space * y), width // (space * x)

    @classmethod
    def from_pipe(cls, pipeline: WanPipeline, **kwargs: Any) -> Self:
        """A pipeline of the same components, each in the precision it has.

        diffusers' own `from_pipe` turns the shared components to fp32 unless told otherwise; here that
        happens only on request, with ``dtype`` or ``torch_dtype``. Other arguments replace components.
        """
        if {"dtype", "torch_dtype", "custom_pipeline"} & set(kwargs):
            made: Self = super().from_pipe(pipeline, **kwargs)
            return made
        known = inspect.signature(cls.__init__).parameters
        settings = {name: value for name, value in pipeline.config.items() if name in known}
        return cls(**{**settings, **pipeline.components, **kwargs})

    @contextlib.contextmanager
    def _attached(self, sparse: Any, grid: tuple[int, int, int]) -> Iterator[mmattn.Session | None]:
        held = self._session
        if sparse is None:
            with contextlib.nullcontext() if held is None else held.disabled():
                yield None
        elif held is None:
            chosen = default_method(grid) if sparse == AUTO else sparse
            with mmattn.attach(self, _methods(chosen)) as session:
                yield session
        elif sparse == AUTO:
            held.reset()
            yield held
        else:
            raise mmattn.ConfigError(
                f"sparse={sparse!r} was asked for while enable_sparse holds {held!r}; call "
                "disable_sparse() first, or leave `sparse` out"
            )


def default_method(grid: tuple[int, int, int]) -> mmattn.VMoBA:
    """VMoBA in the settings its paper has for this token grid, or in its defaults."""
    preset = PRESETS.get(grid)
    return mmattn.VMoBA() if preset is None else getattr(mmattn.VMoBA, preset)()


def _size(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("height", "width", "num_frames", "latents")}


def _methods(sparse: Any) -> Any:
    """What `mmattn.attach` takes, from what a caller of the pipeline gives."""
    if isinstance(sparse, PathLike) or (
        isinstance(sparse, str) and sparse.endswith((".toml", ".json"))
    ):
        return mmattn.load(fspath(sparse))
    if isinstance(sparse, Mapping):
        table = dict(sparse)
        return method_from(table) if "name" in table else recipe_from(table)
    return sparse


def _with_ours(stock: inspect.Signature) -> inspect.Signature:
    """Wan's arguments and ours, for everything that asks the pipeline what it takes."""
    ours = inspect.signature(WanSparsePipeline.__call__).parameters
    added = [ours[name] for name in ("sparse", "report")]
    return stock.replace(parameters=[*stock.parameters.values(), *added])


WanSparsePipeline.__call__.__signature__ = _with_ours(  # type: ignore[attr-defined]
    inspect.signature(WanPipeline.__call__)
)
