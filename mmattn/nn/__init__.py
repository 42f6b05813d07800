"""Layers and models that carry weights: trained attention methods. Importing it registers them with timm.

``import mmattn.nn`` and then ``timm.create_model("agent_deit_tiny")``.
"""

from mmattn.nn import (
    agent_cswin as agent_cswin,
    agent_deit as agent_deit,
    agent_pvt as agent_pvt,
    agent_swin as agent_swin,
    biformer as biformer,
    flow as flow,
    gqa as gqa,
    mala as mala,
    moh as moh,
    moment_probing as moment_probing,
    nala as nala,
    nat as nat,
    probes as probes,
    slab as slab,
    slab_pyramid as slab_pyramid,
    uplift as uplift,
)
