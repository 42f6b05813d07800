"""Density-peak clustering of some keys of every head, with densities from nearest neighbours."""

from __future__ import annotations

import torch


def density_peaks(
    x: torch.Tensor, members: torch.Tensor, clusters: torch.Tensor, neighbours: int
) -> torch.Tensor:
    """Which cluster each member belongs to.

    A point is dense when its `neighbours` nearest others are near: ``rho = exp(-mean d^2)``. Its separation
    ``delta`` is the distance to the nearest denser point; for the densest, to the farthest point of all.
    The points with the largest ``rho * delta`` are centres, and every other joins the nearest centre.
    Distances are Euclidean over the square root of the channels. Of equals the earlier point counts as
    denser, and comes first among centres.

    Args:
        x: ``[..., K, D]``.
        members: ``[..., K]`` bool, the points to cluster; the same number M in every row of the last axis.
        clusters: how many, broadcastable to ``[...]``, each in [1, M].
        neighbours: k, at least 1; M - 1 where that is less.

    Returns:
        ``[..., K]``, the index of the centre at members, and the point itself elsewhere.
    """
    count = int(members.sum(-1).flatten()[0])
    here = torch.arange(members.shape[-1], device=x.device).expand(members.shape)
    if count <= 1:
        return here
    index = torch.argsort(members.int(), dim=-1, descending=True, stable=True)[..., :count]
    points = x.float().gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
    # Differences and not products: equal points are at distance zero, whatever their norm.
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart / x.shape[-1] ** 0.5
    own = torch.eye(count, dtype=torch.bool, device=x.device)
    near = apart.masked_fill(own, torch.inf).topk(min(neighbours, count - 1), largest=False).values
    density = (-near.square().mean(-1)).exp()
    rank = torch.argsort(torch.argsort(density, dim=-1, descending=True, stable=True), dim=-1)
    denser = rank.unsqueeze(-2) < rank.unsqueeze(-1)
    separation = apart.masked_fill(~denser, torch.inf).amin(-1)
    separation = torch.where(rank == 0, apart.amax(-1), separation)
    order = torch.argsort(density * separation, dim=-1, descending=True, stable=True)
    centre = torch.argsort(order, dim=-1) < clusters.unsqueeze(-1)
    nearest = apart.masked_fill(~centre.unsqueeze(-2), torch.inf).argmin(-1)
    nearest = torch.where(centre, torch.arange(count, device=x.device), nearest)
    return here.scatter(-1, index, index.gather(-1, nearest))
