"""Vectors to digits and back: k-means, product quantisation with a learned rotation, whitening.

Everything is plain torch and deterministic given the generator. Distances are computed in blocks,
so memory stays bounded whatever the catalogue. Letters: P points, d width, L digits, K codes per
digit, s = d / L width of a sub-vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distances held at once: 32 MB of floats.
_BLOCK_NUMBERS = 8_000_000
# More points than this for each code change a centroid by less than its own noise.
_POINTS_PER_CODE = 256
# A principal component with less than this share of the largest variance is rounding noise.
_NEGLIGIBLE = 1e-6


class Quantised(NamedTuple):
    """What every quantiser returns."""

    quantised: Tensor  # [N, d], the vectors the codes stand for
    codes: Tensor  # [N, L] int64, 0..K-1
    loss: Tensor  # scalar, mean squared error


# --------------------------------------------------------------------------- k-means


def kmeans(points: Tensor, k: int, generator: torch.Generator, n_iterations: int = 20) -> Tensor:
    """Centroids of points [P, d] -> [k, d], or of L sets at once, [L, P, s] -> [L, k, s].

    Starts from k-means++ and runs Lloyd's algorithm. With fewer than k distinct points some
    centroids are equal. Raises ValueError without points.
    """
    sets = points if points.dim() == 3 else points[None]
    if sets.shape[1] == 0:
        raise ValueError("k-means needs at least one point")
    origin = sets.mean(1, keepdim=True)  # far from zero, distances would be rounding noise
    sets = sets - origin
    centroids = lloyd(sets, spread_points(sets, k, generator), n_iterations) + origin
    return centroids if points.dim() == 3 else centroids[0]


def spread_points(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ start: points [L, P, s] -> [L, k, s], each drawn far from those drawn before."""
    n_sets, n_points, _ = points.shape
    rows = torch.arange(n_sets, device=points.device)
    draws = torch.rand(k, n_sets, 1, generator=generator, dtype=torch.float64).to(points.device)
    squares = points.square().sum(2)  # [L, P]
    nearest = torch.ones_like(squares)
    chosen = []
    for draw in draws:
        mass = nearest.double().cumsum(1)
        index = torch.searchsorted(mass, draw * mass[:, -1:]).clamp(max=n_points - 1)[:, 0]
        centre = points[rows, index]  # [L, s]
        distance = squares - 2 * (points @ centre[:, :, None])[:, :, 0]
        distance = (distance + centre.square().sum(1, keepdim=True)).clamp(min=0)
        nearest = distance if not chosen else torch.minimum(nearest, distance)
        chosen.append(centre)
    return torch.stack(chosen, dim=1)


def lloyd(points: Tensor, centroids: Tensor, n_iterations: int) -> Tensor:
    """Improve centroids [L, K, s] on points [L, P, s]; empty clusters restart at far points."""
    for _ in range(n_iterations):
        codes, distance = assign(points, centroids)
        centroids = _means(points, codes, distance, centroids)
    return centroids


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point and its squared distance, both [L, P], in blocks of points."""
    half_norms = 0.5 * centroids.square().sum(2)[:, None]  # [L, 1, K]
    turned = centroids.transpose(1, 2)  # [L, s, K]
    block = max(1, _BLOCK_NUMBERS // (centroids.shape[0] * centroids.shape[1]))
    parts = []
    for chunk in points.split(block, dim=1):
        # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest centroid has the largest bracket
        parts.append(torch.baddbmm(half_norms, chunk, turned, beta=-1).max(2))
    codes = torch.cat([part.indices for part in parts], dim=1)
    best = torch.cat([part.values for part in parts], dim=1)
    return codes, (points.square().sum(2) - 2 * best).clamp(min=0)


def _means(points: Tensor, codes: Tensor, distance: Tensor, centroids: Tensor) -> Tensor:
    n_sets, k, width = centroids.shape
    flat = (codes + k * torch.arange(n_sets, device=codes.device)[:, None]).flatten()  # [L * P]
    counts = torch.bincount(flat, minlength=n_sets * k).view(n_sets, k, 1)
    sums = points.new_zeros(n_sets * k, width).index_add_(0, flat, points.reshape(-1, width))
    means = sums.view(n_sets, k, width) / counts.clamp(min=1)
    empty = counts[:, :, 0] == 0
    if bool(empty.any()):
        far = distance.topk(min(k, points.shape[1]), dim=1).indices  # farthest first
        rank = (empty.cumsum(1) - 1).clamp(0, far.shape[1] - 1)
        spare = points.gather(1, far.gather(1, rank)[:, :, None].expand(-1, -1, width))
        means = torch.where(empty[:, :, None], spare, means)
    return means


# --------------------------------------------------------------------------- product quantiser


class ProductQuantiser(nn.Module):
    """Optimised product quantisation (Ge et al., CVPR 2013): rotate, cut in L parts, k-means each.

    min over R, C of sum ||(x - mean) R - q||^2 with R orthogonal and q made of one centroid a part.
    """

    rotation: Tensor  # [d, d]
    mean: Tensor  # [d]
    codebooks: Tensor  # [L, K, s]

    def __init__(self, width: int, digits: int, codes: int) -> None:
        super().__init__()
        if width % digits:
            raise ValueError(f"width {width} cannot be cut into {digits} equal parts")
        self.register_buffer("rotation", torch.eye(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("codebooks", torch.zeros(digits, codes, width // digits))

    @torch.no_grad()
    def fit(
        self,
        points: Tensor,
        generator: torch.Generator,
        n_rounds: int = 20,
        n_polish: int = 10,
        rotate: bool = True,
    ) -> ProductQuantiser:
        """Learn mean, rotation and codebooks from points [P, d]; plain PQ with `rotate=False`.

        Each round moves the centroids by one Lloyd step, warm-started, and then turns the space so
        that points come as near as possible to their centroids (orthogonal Procrustes).
        """
        digits, codes, _ = self.codebooks.shape
        limit = _POINTS_PER_CODE * codes
        if len(points) > limit:
            points = points[torch.randperm(len(points), generator=generator)[:limit]]
        mean = points.mean(0)
        centred = points - mean
        rotation = torch.eye(points.shape[1]).to(points)
        if rotate:
            rotation = balanced_rotation(centred, digits, generator)
        rotated = centred @ rotation
        books = spread_points(self._cut(rotated), codes, generator)
        for _ in range(n_rounds if rotate else 0):
            parts = self._cut(rotated)
            nearest, distance = assign(parts, books)
            books = _means(parts, nearest, distance, books)
            rotation = procrustes(centred, _look_up(books, nearest.T))
            rotated = centred @ rotation
        books = lloyd(self._cut(rotated), books, n_polish)
        for name, value in (("rotation", rotation), ("mean", mean), ("codebooks", books)):
            getattr(self, name).copy_(value)
        return self

    def encode(self, points: Tensor) -> Tensor:
        """Points [N, d] -> codes [N, L] int64."""
        return assign(self._cut((points - self.mean) @ self.rotation), self.codebooks)[0].T

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, L] -> the points [N, d] they stand for."""
        return _look_up(self.codebooks, codes) @ self.rotation.T + self.mean

    def forward(self, points: Tensor) -> Quantised:
        """Points [N, d] -> their quantised form, codes and mean squared error."""
        codes = self.encode(points)
        quantised = self.decode(codes)
        return Quantised(quantised, codes, F.mse_loss(quantised, points))

    def _cut(self, rotated: Tensor) -> Tensor:
        """[P, d] -> [L, P, s]."""
        digits, _, part = self.codebooks.shape
        return rotated.view(len(rotated), digits, part).transpose(0, 1).contiguous()


class BlendQuantiser(nn.Module):
    """Product quantiser of blended vectors x(alpha), by table look-up.

    The blend keeps every modality in dimensions of its own: digit l looks at the sub-vector
    x_l(alpha) = [alpha_1 z_1^l, ..., alpha_M z_M^l], so codes spend their resolution on the
    modalities that carry weight, and a code never means one thing in pictures and another in
    words. Codewords have unit length, so the nearest one is
        digit_l = argmax_k <x_l, c_lk> = argmax_k sum_m alpha_m T_ml[i, k],  T_ml = <z_im^l, c_lk^m>
    a blend of tables that do not depend on the user. It looks at the direction of x only: an even
    blend, which is shorter than its parts, is not drawn to other codewords for that.
    """

    codebooks: Tensor  # [L, K, M, s], unit length over the last two axes

    def __init__(self, modalities: int, width: int, digits: int, codes: int) -> None:
        super().__init__()
        if width % digits:
            raise ValueError(f"width {width} cannot be cut into {digits} equal parts")
        shape = (digits, codes, modalities, width // digits)
        self.register_buffer("codebooks", torch.zeros(shape))

    @torch.no_grad()
    def fit(
        self, blends: Tensor, generator: torch.Generator, n_iterations: int = 20
    ) -> BlendQuantiser:
        """Spherical k-means of every sub-vector of weighted latents blends [P, M, z]."""
        codes = self.codebooks.shape[1]
        limit = _POINTS_PER_CODE * codes
        if len(blends) > limit:
            blends = blends[torch.randperm(len(blends), generator=generator)[:limit]]
        parts = F.normalize(self._cut(blends).flatten(2), dim=2)  # [L, P, M * s]
        books = F.normalize(spread_points(parts, codes, generator), dim=2)
        for _ in range(n_iterations):
            books = F.normalize(lloyd(parts, books, 1), dim=2)
        self.codebooks.copy_(books.view_as(self.codebooks))
        return self

    def tables(self, latents: Tensor) -> Tensor:
        """T for latents [n, M, z]: [M, L, n, K]."""
        parts = self._cut(latents).permute(2, 0, 1, 3)  # [M, L, n, s]
        return parts @ self.codebooks.permute(2, 0, 3, 1)

    def codes(self, tables: Tensor, weights: Tensor) -> Tensor:
        """tables [M, L, n, K], weights [M, n] -> codes [n, L] int64, exact."""
        return (tables * weights[:, None, :, None]).sum(0).argmax(2).T

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, L] -> the blends [n, M, z] they stand for, unit length."""
        digits = torch.arange(codes.shape[1], device=codes.device)
        words = self.codebooks[digits, codes].transpose(1, 2)  # [n, M, L, s]
        return words.flatten(2) / len(digits) ** 0.5

    @torch.no_grad()
    def atlas(self, latents: Tensor, grid: Tensor, block: int = 1024) -> Tensor:
        """Codes of every item under every blend of grid [G, M]: [G, N, L] int64."""
        parts = []
        for chunk in latents.split(block):
            tables = self.tables(chunk)
            parts.append(torch.stack([self.codes(tables, w[:, None]) for w in grid]))
        return torch.cat(parts, dim=1)

    def _cut(self, latents: Tensor) -> Tensor:
        # [P, M, z] -> [L, P, M, s]
        digits, _, modalities, part = self.codebooks.shape
        return latents.view(len(latents), modalities, digits, part).permute(2, 0, 1, 3)


def projected_codewords(codebooks: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Random projections of codebooks [L, K, s] to vectors [L K, width], digit by digit.

    Rows of digit l start at l K, as token tables are laid out. Dot products of sums of them
    estimate those of the vectors the codes stand for (Johnson and Lindenstrauss). Mean length 1.
    """
    n_digits, _, part = codebooks.shape
    turn = torch.randn(n_digits, part, width, generator=generator).to(codebooks)
    rows = (codebooks @ turn).flatten(0, 1)
    return rows / rows.norm(dim=1).mean().clamp(min=1e-12)


def _look_up(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Codebooks [L, K, s] and codes [N, L] -> [N, L * s]."""
    return codebooks[torch.arange(len(codebooks), device=codes.device), codes].flatten(1)


def procrustes(points: Tensor, wanted: Tensor) -> Tensor:
    """The orthogonal R that minimises ||points R - wanted||; both [P, d] -> [d, d]."""
    left, _, right = torch.linalg.svd(points.T @ wanted)
    return left @ right


def balanced_rotation(centred: Tensor, digits: int, generator: torch.Generator) -> Tensor:
    """PCA axes dealt out so that every sub-vector gets about the same product of variances.

    Eigenvalue allocation of Ge et al., section 3.2: largest first, to the part with the smallest
    product that still has room. Data of a rank below `digits` would leave parts with nothing to
    tell items apart, so there the axes are random. centred [P, d] -> [d, d].
    """
    width = centred.shape[1]
    variances, axes = torch.linalg.eigh((centred.T @ centred).double() / len(centred))
    if int((variances > _NEGLIGIBLE * variances[-1]).sum()) < digits:
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0].to(centred)
    logs = variances.clamp(min=float(variances[-1]) * _NEGLIGIBLE).log()
    logs = (logs - logs.min()).tolist()  # from 0 up, so that a part with more axes weighs more
    parts: list[list[int]] = [[] for _ in range(digits)]
    load = [0.0] * digits
    for axis in range(width - 1, -1, -1):
        open_parts = [part for part in range(digits) if len(parts[part]) < width // digits]
        part = min(open_parts, key=lambda p: (load[p], len(parts[p])))
        parts[part].append(axis)
        load[part] += logs[axis]
    return axes[:, [axis for part in parts for axis in part]].to(centred)


# --------------------------------------------------------------------------- whitening


def whitened_pca(features: Tensor, fit_rows: Tensor, width: int, explained: float = 1.0) -> Tensor:
    """Principal components with unit variance: features [N, d] -> [N, min(width, rank)].

    With `explained` below 1 only the leading ones that hold this share of the variance: whitening
    makes the noise of the others as large as what items are told apart by.

    Mean and axes come from the rows where `fit_rows` [N] is True; every row is transformed.
    Components of negligible variance are dropped, since whitening would blow up rounding noise.
    Raises ValueError when the fitted rows do not vary at all.
    """
    fitted = features[fit_rows]
    if len(fitted) < 2:
        raise ValueError("whitening needs at least two items with features")
    # from the first row, so that rows all alike leave exactly zero and no rounding noise
    mean = fitted[0] + (fitted - fitted[0]).mean(0)
    fitted = fitted - mean
    variances, axes = torch.linalg.eigh((fitted.T @ fitted).double() / (len(fitted) - 1))
    variances, axes = variances.flip(0), axes.flip(1)  # largest first
    rank = int((variances > _NEGLIGIBLE * variances[0]).sum()) if variances[0] > 0 else 0
    if rank == 0:
        raise ValueError("the features of all items are the same: there is nothing to quantise")
    shares = variances.clamp(min=0).cumsum(0) / variances.clamp(min=0).sum()
    enough = int((shares < explained - _NEGLIGIBLE).sum()) + 1
    kept = min(width, rank, enough)
    scaled = axes[:, :kept] / variances[:kept].sqrt()
    return (features - mean) @ scaled.to(features)
