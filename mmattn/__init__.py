"""mmattn: attach published attention techniques to models you already have, and prove what they did.

Importing this package imports no torch, patches nothing, and loads no host library; names below are
resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmattn import methods as methods
    from mmattn.attaching import attach as attach
    from mmattn.config import Recipe as Recipe, load as load
    from mmattn.errors import (
        BudgetNotMet as BudgetNotMet,
        ConfigError as ConfigError,
        ConflictError as ConflictError,
        DetachConflict as DetachConflict,
        HostVersionError as HostVersionError,
        MissingExtraError as MissingExtraError,
        MmattnError as MmattnError,
        ModelLoadError as ModelLoadError,
        NoSiteError as NoSiteError,
        SeamNotReached as SeamNotReached,
        SelectorError as SelectorError,
        UnsupportedCall as UnsupportedCall,
    )
    from mmattn.layout import Layout as Layout
    from mmattn.methods.act import ACT as ACT
    from mmattn.methods.agent_attention import AgentAttention as AgentAttention
    from mmattn.methods.agentsd import AgentSD as AgentSD
    from mmattn.methods.astar import AStar as AStar
    from mmattn.methods.attention_maps import AttentionMaps as AttentionMaps
    from mmattn.methods.base import AttentionMethod as AttentionMethod, Method as Method
    from mmattn.methods.dola import DoLa as DoLa
    from mmattn.methods.fastv import FastV as FastV
    from mmattn.methods.flashbias import FlashBias as FlashBias
    from mmattn.methods.flexprefill import FlexPrefill as FlexPrefill
    from mmattn.methods.hiprune import HiPrune as HiPrune
    from mmattn.methods.identity import Identity as Identity
    from mmattn.methods.imageguidance import ImageGuidance as ImageGuidance
    from mmattn.methods.isolation_reposition import IsolationReposition as IsolationReposition
    from mmattn.methods.largepig import LargePiG as LargePiG
    from mmattn.methods.merge_prune import MergePrune as MergePrune
    from mmattn.methods.neighborhood import NeighborhoodAttention as NeighborhoodAttention
    from mmattn.methods.opera import Opera as Opera, opera_search as opera_search
    from mmattn.methods.pai import PAI as PAI
    from mmattn.methods.paint import PAINT as PAINT
    from mmattn.methods.panel_attention import PanelAttention as PanelAttention
    from mmattn.methods.proxyattn import ProxyAttn as ProxyAttn
    from mmattn.methods.pyramiddrop import PyramidDrop as PyramidDrop
    from mmattn.methods.random_blocks import RandomBlocks as RandomBlocks
    from mmattn.methods.random_prune import RandomPrune as RandomPrune
    from mmattn.methods.sliding_window import SlidingWindow as SlidingWindow
    from mmattn.methods.sparsed import SparseD as SparseD
    from mmattn.methods.tome import ToMe as ToMe
    from mmattn.methods.uniform_prune import UniformPrune as UniformPrune
    from mmattn.methods.var import VAR as VAR
    from mmattn.methods.vasparse import VASparse as VASparse
    from mmattn.methods.vcd import VCD as VCD
    from mmattn.methods.vhr import VHR as VHR
    from mmattn.methods.visionzip import VisionZip as VisionZip
    from mmattn.methods.vmoba import VMoBA as VMoBA
    from mmattn.methods.zerotuning import ZeroTuning as ZeroTuning
    from mmattn.planning import Plan as Plan, plan as plan
    from mmattn.registry import register as register
    from mmattn.report import Stats as Stats
    from mmattn.session import Session as Session
    from mmattn.sites import Site as Site

__version__ = "0.1.0"

_EXPORTS = {
    "attach": "mmattn.attaching",
    "plan": "mmattn.planning",
    "Plan": "mmattn.planning",
    "Session": "mmattn.session",
    "Stats": "mmattn.report",
    "Site": "mmattn.sites",
    "Layout": "mmattn.layout",
    "Recipe": "mmattn.config",
    "load": "mmattn.config",
    "register": "mmattn.registry",
    "methods": "mmattn.methods",
    "Method": "mmattn.methods.base",
    "AttentionMethod": "mmattn.methods.base",
    "Identity": "mmattn.methods.identity",
    "ACT": "mmattn.methods.act",
    "AgentAttention": "mmattn.methods.agent_attention",
    "AgentSD": "mmattn.methods.agentsd",
    "AStar": "mmattn.methods.astar",
    "AttentionMaps": "mmattn.methods.attention_maps",
    "DoLa": "mmattn.methods.dola",
    "FastV": "mmattn.methods.fastv",
    "FlashBias": "mmattn.methods.flashbias",
    "FlexPrefill": "mmattn.methods.flexprefill",
    "HiPrune": "mmattn.methods.hiprune",
    "ImageGuidance": "mmattn.methods.imageguidance",
    "IsolationReposition": "mmattn.methods.isolation_reposition",
    "LargePiG": "mmattn.methods.largepig",
    "MergePrune": "mmattn.methods.merge_prune",
    "NeighborhoodAttention": "mmattn.methods.neighborhood",
    "Opera": "mmattn.methods.opera",
    "opera_search": "mmattn.methods.opera",
    "PAI": "mmattn.methods.pai",
    "PAINT": "mmattn.methods.paint",
    "PanelAttention": "mmattn.methods.panel_attention",
    "ProxyAttn": "mmattn.methods.proxyattn",
    "PyramidDrop": "mmattn.methods.pyramiddrop",
    "RandomBlocks": "mmattn.methods.random_blocks",
    "RandomPrune": "mmattn.methods.random_prune",
    "SlidingWindow": "mmattn.methods.sliding_window",
    "SparseD": "mmattn.methods.sparsed",
    "ToMe": "mmattn.methods.tome",
    "UniformPrune": "mmattn.methods.uniform_prune",
    "VAR": "mmattn.methods.var",
    "VASparse": "mmattn.methods.vasparse",
    "VCD": "mmattn.methods.vcd",
    "VHR": "mmattn.methods.vhr",
    "VisionZip": "mmattn.methods.visionzip",
    "VMoBA": "mmattn.methods.vmoba",
    "ZeroTuning": "mmattn.methods.zerotuning",
    "MmattnError": "mmattn.errors",
    "BudgetNotMet": "mmattn.errors",
    "ModelLoadError": "mmattn.errors",
    "NoSiteError": "mmattn.errors",
    "SelectorError": "mmattn.errors",
    "ConflictError": "mmattn.errors",
    "UnsupportedCall": "mmattn.errors",
    "SeamNotReached": "mmattn.errors",
    "DetachConflict": "mmattn.errors",
    "ConfigError": "mmattn.errors",
    "HostVersionError": "mmattn.errors",
    "MissingExtraError": "mmattn.errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        module = import_module(_EXPORTS[name])
        # `mmattn.methods` is the package of methods, and calling it lists them.
        value = module if name == "methods" else getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mmattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
