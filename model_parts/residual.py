"""Codes from coarse to fine: residual k-means, RQ-VAE, cosine codebooks, and unique IDs.

    ResidualQuantiser(width, digits, codes)          fit(points, generator): k-means of what is left
    RQVAE(width, latent, digits, codes, ...)         the same inside an autoencoder
    train_autoencoder(model, points, generator, steps)   trains it
    CosineQuantiser(parts, codes, width)             one codebook for each part
    with_collision_digit(codes, n_codes), repair_last_digit(...)   two ways to tell items apart

Every quantiser returns a `Quantised`. Letters: P points, d width, z latent width, L digits, K codes
per digit. Randomness comes from the generator alone, initial weights included.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.quantisers import Quantised, assign, kmeans
from model_parts.stage_one import minimise

# Pull of a vector to its codeword against that of the codeword to the vector (TIGER, LETTER).
COMMITMENT = 0.25
# Steps between two fits of the codebooks to where the encoder has taken the items.
_FIT_EVERY = 50
# Points that codebooks are fitted to, for each code.
_FIT_POINTS = 64


class ResidualQuantiser(nn.Module):
    """Residual k-means: digit l is the nearest centroid to what digits 1..l-1 left over."""

    codebooks: Tensor  # [L, K, d]

    def __init__(self, width: int, digits: int, codes: int) -> None:
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(digits, codes, width))

    @torch.no_grad()
    def fit(
        self, points: Tensor, generator: torch.Generator, n_iterations: int = 20
    ) -> ResidualQuantiser:
        """Learn the codebooks from points [P, d], one level after the other."""
        rest = points
        for book in self.codebooks:
            book.copy_(kmeans(rest, len(book), generator, n_iterations))
            rest = rest - book[assign(rest[None], book[None])[0][0]]
        return self

    def encode(self, points: Tensor) -> Tensor:
        """Points [N, d] -> codes [N, L] int64."""
        return residual_codes(points, self.codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, L] -> the points [N, d] they stand for."""
        return chosen_words(self.codebooks, codes).sum(1)

    def forward(self, points: Tensor) -> Quantised:
        """Points [N, d] -> their quantised form, codes and mean squared error."""
        codes = self.encode(points)
        quantised = self.decode(codes)
        return Quantised(quantised, codes, F.mse_loss(quantised, points))


def residual_codes(points: Tensor, codebooks: Tensor) -> Tensor:
    """Nearest codeword of each level to the rest: points [N, d], codebooks [L, K, d] -> [N, L]."""
    rest, codes = points, []
    for book in codebooks:
        codes.append(assign(rest[None], book[None])[0][0])
        rest = rest - book[codes[-1]]
    return torch.stack(codes, dim=1)


def chosen_words(codebooks: Tensor, codes: Tensor) -> Tensor:
    """The codewords of codes [N, L]: [N, L, d]."""
    return codebooks[torch.arange(codes.shape[1], device=codes.device), codes]


# --------------------------------------------------------------------------- autoencoder


class RQVAE(nn.Module):
    """Autoencoder with residual codebooks in the middle (Zeghidour et al. 2021; TIGER section 3.1).

        z = enc(x), r_1 = z, c_l = nearest codeword to r_l, r_(l+1) = r_l - c_l, z^ = sum_l c_l
        loss = |x - dec(z + sg[z^ - z])|^2 + mean_l |sg[r_l] - c_l|^2 + .25 |r_l - sg[c_l]|^2

    Squares are means over elements. The encoder has `depth` hidden layers of width hidden,
    hidden / 2, ..., ReLU between them; the decoder is its mirror image.
    """

    def __init__(
        self,
        width: int,
        latent: int,
        digits: int,
        codes: int,
        hidden: int,
        depth: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        widths = [width, *(max(hidden >> level, 1) for level in range(depth)), latent]
        self.encoder = _perceptron(widths, generator)
        self.decoder = _perceptron(widths[::-1], generator)
        self.codebooks = nn.Parameter(torch.zeros(digits, codes, latent))

    def quantise(self, latents: Tensor) -> Quantised:
        """Latents [N, z] -> z^ with the gradient of z [N, z], codes [N, L], codebook loss."""
        rest, codes, loss = latents, [], latents.new_zeros(())
        for book in self.codebooks:
            codes.append(assign(rest.detach()[None], book.detach()[None])[0][0])
            word = book[codes[-1]]
            loss = loss + F.mse_loss(word, rest.detach())
            loss = loss + COMMITMENT * F.mse_loss(rest, word.detach())
            rest = rest - word.detach()
        # what is left over is z - z^
        quantised = latents - rest.detach()
        return Quantised(quantised, torch.stack(codes, dim=1), loss / len(codes))

    def forward(self, points: Tensor) -> Quantised:
        """Points [N, d] -> their reconstruction [N, d], codes and the loss above."""
        latent = self.quantise(self.encoder(points))
        rebuilt = self.decoder(latent.quantised)
        return Quantised(rebuilt, latent.codes, F.mse_loss(rebuilt, points) + latent.loss)

    @torch.no_grad()
    def encode(self, points: Tensor) -> Tensor:
        """Points [N, d] -> codes [N, L] int64."""
        return residual_codes(self.encoder(points), self.codebooks)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, L] -> the points [N, d] they stand for."""
        return self.decoder(chosen_words(self.codebooks, codes).sum(1))

    @torch.no_grad()
    def fit_codebooks(self, points: Tensor, generator: torch.Generator) -> None:
        """Codebooks from residual k-means of the latents of points [P, d]."""
        digits, codes, latent = self.codebooks.shape
        rows = torch.randperm(len(points), generator=generator)[: _FIT_POINTS * codes]
        quantiser = ResidualQuantiser(latent, digits, codes).to(points.device)
        quantiser.fit(self.encoder(points[rows]), generator, n_iterations=10)
        self.codebooks.copy_(quantiser.codebooks)

    @torch.no_grad()
    def leftovers(self, points: Tensor) -> Tensor:
        """What each level has to quantise, r_l of points [P, d]: [L, P, z]."""
        latents = self.encoder(points)
        words = chosen_words(self.codebooks, residual_codes(latents, self.codebooks))
        return latents - (words.cumsum(1) - words).transpose(0, 1)


def _perceptron(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in pairwise(widths):
        layer = nn.Linear(size, following)
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_autoencoder(
    model: RQVAE,
    points: Tensor,
    generator: torch.Generator,
    steps: int,
    batch_size: int = 1024,
    lr: float = 1e-3,
    extra: Callable[[Tensor, Quantised], Tensor] | None = None,
) -> None:
    """Train on points [P, d] for a number of steps.

    Codewords go a step of AdamW at a time, at most lr, and latents run away from them where another
    loss pulls: codes would then say little of an item. So codebooks are fitted anew by k-means as
    training goes on, which leaves no code unused either, and at its end.
    `extra(rows [B], latent)` adds to the loss; `latent` is what `quantise` returned for those rows.
    Raises ValueError without points.
    """
    if not len(points):
        raise ValueError("an autoencoder needs at least one item with features in the train part")

    def loss(step: int) -> Tensor:
        if step % _FIT_EVERY == 0:
            model.fit_codebooks(points, generator)
        rows = torch.randint(len(points), (min(batch_size, len(points)),), generator=generator)
        chunk = points[rows]
        latent = model.quantise(model.encoder(chunk))
        total = F.mse_loss(model.decoder(latent.quantised), chunk) + latent.loss
        return total if extra is None else total + extra(rows.to(points.device), latent)

    minimise(model, loss, steps, lr, weight_decay=1e-4)
    model.fit_codebooks(points, generator)


@torch.no_grad()
def revive(codebooks: Tensor, used: Tensor, candidates: Tensor, generator: torch.Generator) -> None:
    """Put codes that were not `used` [L, K] on random candidates [L, P, d], in place."""
    for book, alive, vectors in zip(codebooks, used, candidates, strict=True):
        dead = torch.nonzero(~alive)[:, 0]
        rows = torch.randint(len(vectors), (len(dead),), generator=generator)
        book[dead] = vectors[rows.to(vectors.device)]


# --------------------------------------------------------------------------- cosine codebooks


class CosineQuantiser(nn.Module):
    """A codebook for each of L parts, the code is the one of largest cosine (MMQ, section 4.3).

    code_l = argmax_k cos(z_l, q_lk)
    loss = |sg[z/|z|] - q/|q||^2 + .25 |z/|z| - sg[q/|q|]|^2, mean over points and parts
    """

    def __init__(self, parts: int, codes: int, width: int) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(torch.zeros(parts, codes, width))

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> None:
        """Codebooks from k-means of the directions of latents [P, L, d]."""
        directions = F.normalize(latents, dim=2).transpose(0, 1)
        books = kmeans(directions, self.codebooks.shape[1], generator)
        self.codebooks.copy_(F.normalize(books, dim=2))

    def cosines(self, latents: Tensor) -> Tensor:
        """Latents [N, L, d] -> cosines with all codewords [N, L, K]."""
        words = F.normalize(self.codebooks, dim=2).transpose(1, 2)  # [L, d, K]
        return torch.bmm(F.normalize(latents, dim=2).transpose(0, 1), words).transpose(0, 1)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [N, L, d] -> codes [N, L] int64."""
        return self.cosines(latents).argmax(2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, L] -> unit codewords [N, L, d]."""
        return F.normalize(chosen_words(self.codebooks, codes), dim=2)

    def forward(self, latents: Tensor) -> Quantised:
        """Latents [N, L, d] -> unit codewords with the gradient of z / |z|, codes, loss."""
        directions = F.normalize(latents, dim=2)
        codes = self.encode(latents.detach())
        words = self.decode(codes)
        loss = (words - directions.detach()).square().sum(2).mean()
        loss = loss + COMMITMENT * (directions - words.detach()).square().sum(2).mean()
        return Quantised(directions + (words - directions).detach(), codes, loss)


# --------------------------------------------------------------------------- unique IDs


def with_collision_digit(codes: Tensor, n_codes: int) -> Tensor:
    """Append a digit that counts items with equal codes: [N, L] -> [N, L + 1] (TIGER, section 3.1).

    The first item of a group gets 0, the next 1, and so on. Beyond `n_codes` items it starts again:
    those items keep sharing an ID.
    """
    group = torch.unique(codes, dim=0, return_inverse=True)[1]
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group)
    first = (counts.cumsum(0) - counts)[group[order]]  # where the group begins in `order`
    digit = torch.empty_like(group)
    digit[order] = (torch.arange(len(codes), device=codes.device) - first) % n_codes
    return torch.cat([codes, digit[:, None]], dim=1)


def repair_last_digit(codes: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
    """Move items that share all digits to the nearest last codes that are free: [N, L] -> [N, L].

    `distances(rows [G])` gives [G, K], how far the rests of these items are from every last
    codeword. Nearest items choose first. Codes already taken under a prefix stay taken; an item
    that finds none free stays where it was.
    """
    repaired = codes.clone()
    prefix, shared = (
        torch.unique(part, dim=0, return_inverse=True)[1] for part in (codes[:, :-1], codes)
    )
    colliding = torch.bincount(shared)[shared] > 1
    for branch in prefix[colliding].unique():
        members = torch.nonzero((prefix == branch) & colliding)[:, 0]
        table = distances(members)
        inside = torch.nonzero(prefix == branch)[:, 0]
        free = torch.ones(table.shape[1], dtype=torch.bool, device=codes.device)
        free[codes[inside, -1]] = False
        held = torch.zeros_like(free)
        own = table.gather(1, codes[members, -1:])[:, 0]
        for place in own.argsort().tolist():
            row, code = members[place], codes[members[place], -1]
            if held[code] and bool(free.any()):
                code = table[place].masked_fill(~free, float("inf")).argmin()
                repaired[row, -1] = code
            held[code], free[code] = True, False
    return repaired


def holders(codes: Tensor) -> Tensor:
    """How many of the items with IDs codes [N, L] have the ID of each, [N]."""
    group, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)[1:]
    return counts[group]


def colliding_share(codes: Tensor) -> float:
    """Share of items whose ID another item has as well."""
    return float((holders(codes) > 1).float().mean())
