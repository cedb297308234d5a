"""Eigenvectors of graphs of patches: the one of a normalised cut, the smallest ones of a Laplacian, and their signs.

Torch tensors only, on any device, always a batch of B graphs of P nodes each. Both solvers are one: a block Lanczos
iteration, written as Rayleigh-Ritz on a basis that is kept orthonormal in double precision, with a residual test at
every step and thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). The products with the P x P matrix
are what it costs. They are bound by memory: the matrix stays in single precision, some rows at a time become double.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4  # start vectors: an eigenvalue of this multiplicity is seen as such; a product with 4 costs about two with 1
BASIS = 64  # vectors kept before a restart, beyond twice those asked for
PRODUCTS = 300  # blocks multiplied at most; 5 to 15 is usual
CACHED = 1 << 18  # numbers of a matrix in double precision at a time: 2 MB, which are near a core and used again
ON_GPU = 64  # times as many there, where each start of a kernel counts
ROUGH = 3e-6  # residual reached with products in single precision, whose errors are up to 1e-6 of the matrix
RESIDUAL = 1e-6  # at most, of the second eigenvector; if nothing is certain then, the iteration goes on to EXACT
EXACT = 1e-12
THIRD = 1e-3  # residual of the third, whose value alone counts; its error is about the square of that
TIE = 1e-6  # entries whose sizes differ by less than this share of the largest are alike
AMBIGUOUS = 1e-3  # gap of eigenvalues below which two cuts are about as good as each other


@dataclass(frozen=True)
class Cut:
    """The second eigenvectors of B graphs, (D - A) y = lambda D y, and how well they are known."""

    vector: Tensor  # float64 (B, P): y with y^T D y = 1, its sign as it came (see `orient`)
    value: Tensor  # float64 (B,): lambda2
    gap: Tensor  # float64 (B,): lambda3 - lambda2; lambda3 = 2, the largest there can be, where P < 3. Near 0: no one y
    residual: Tensor  # float64 (B,): |D^-1/2 A y - (1 - lambda2) D^1/2 y|
    certified: Tensor  # bool (B,): rounding cannot have moved a node across the mean of y, nor the seed of `orient`
    degree: Tensor  # float64 (B, P)


def second_eigenvectors(weights: Tensor, *, eps: float = 0.0) -> Cut:
    """The second smallest solution of (D - A) y = lambda D y for the graphs A = (1 - eps) weights + eps.

    weights: float32 (B, P, P), symmetric, not negative, P >= 2; 0 and 1 make the graph of TokenCut (Wang et al., CVPR
    2022), whose degrees are then exact counts. Its first solution, the constant, is known and kept out. The iteration
    runs on products in single precision, then on sharper ones until what follows from the vector is certain.
    """
    import torch

    start = _random(weights[..., 0], BLOCK)
    sharp = dense(weights)
    degree = (1 - eps) * sharp(torch.ones_like(start[..., :1]))[..., 0] + eps * weights.shape[2]
    root = degree.sqrt()[..., None]  # (B, P, 1)

    def normal(rows: Callable, vectors: Tensor) -> Tensor:  # D^-1/2 A D^-1/2 by a product with the weights
        vectors = vectors / root
        return ((1 - eps) * rows(vectors) + eps * vectors.sum(1, keepdim=True)) / root

    def is_near(found: Ritz, second: float = ROUGH) -> Tensor:
        return (found.residuals[:, 0] <= second) & (found.residuals[:, :2][:, -1] <= THIRD)

    def is_certain(found: Ritz) -> Tensor:
        return is_near(found, EXACT) | (is_near(found, RESIDUAL) & _read(found, degree).certified)

    options = {"count": min(BLOCK, weights.shape[2] - 1), "known": root / root.norm(dim=1, keepdim=True)}
    found = _largest(partial(normal, partial(_quick, weights)), start, finished=is_near, **options)
    return _read(_largest(partial(normal, sharp), found.vectors, finished=is_certain, **options), degree)


def smallest_eigenpairs(
    product: Callable[[Tensor], Tensor], degree: Tensor, count: int, *, normalised: bool = True, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The smallest solutions of (D - W) y = lambda D y, or of (D - W) y = lambda y.

    product: W times float64 (B, P, any), W symmetric and not negative, such as that of `dense`. degree: (B, P),
    positive. count: how many, at most P - 1. tolerance: of the residuals, relative to D; products in single precision
    do not reach less than 1e-6 for certain, and cost PRODUCTS when they do not. Returns eigenvalues float64 (B, K),
    ascending, at least 0, and vectors float64 (B, K, P) with y^T D y = 1, or y^T y = 1; signs as they come (see
    `minority_positive`). K = min(count, P - 1). The constant is the first of them.
    """
    import torch

    degree = degree.double()
    root = degree.sqrt()[..., None]  # (B, P, 1)
    largest = degree.amax(1)[:, None, None]
    count = max(1, min(count, degree.shape[1] - 1))

    def normal(vectors):
        return product(vectors / root).double() / root

    def shifted(vectors):  # (W - D) / max D: a Krylov space does not change with the shift
        return (product(vectors).double() - degree[..., None] * vectors) / largest

    constant = root if normalised else torch.ones_like(root)
    start = torch.cat([constant, _random(degree, BLOCK - 1)], 2)
    ritz = _largest(
        normal if normalised else shifted,
        start,
        count=count,
        finished=lambda found: (found.residuals <= tolerance).all(1),
    )
    values = 1 - ritz.values if normalised else -ritz.values * largest[..., 0]
    vectors = ritz.vectors / root if normalised else ritz.vectors
    return values.clamp(min=0), vectors.mT


def dense(weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of a symmetric matrix in memory, float32 (B, P, P), in double precision, some rows at a time."""
    import torch

    step = max(1, CACHED * (ON_GPU if weights.is_cuda else 1) // weights[:, 0].numel())

    def product(vectors: Tensor) -> Tensor:
        across = vectors.mT.double().contiguous()  # (B, any, P)
        made = torch.empty_like(across)
        for first in range(0, across.shape[2], step):
            made[..., first : first + step] = across @ weights[:, first : first + step].double().mT
        return made.mT

    return product


def orient(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors turned so that their seed is above the mean: TokenCut's two halves (Wang et al., CVPR 2022).

    vector: (B, P). The seed is the entry of the largest size; of entries alike up to `TIE` the first. Returns the
    turned vector, the upper half bool (B, P), and the seed int64 (B,). An entry that equals the mean, up to as much, is
    in the half that has no seed: where two patches resemble no others that is all the rest. In the paper's code it is
    on the side that rounding and the sign, as the solver happens to give it, put it.
    """
    size = vector.abs()
    most = size.amax(1, keepdim=True)
    seed = (size >= (1 - TIE) * most).int().argmax(1)  # the first of equals
    vector = vector.where(vector.gather(1, seed[:, None]) > 0, -vector)
    return vector, vector - vector.mean(1, keepdim=True) > TIE * most, seed


def minority_positive(vectors: Tensor) -> Tensor:
    """Eigenvectors (..., P), each negated where more than half, but not all, of its entries are above 0.

    So the object, which is smaller than its surroundings, is positive (Melas-Kyriazi et al., CVPR 2022). Where that
    leaves the sign open, as of two halves, the first entry is negative. Entries below `TIE` of the largest become 0:
    their sign is that of rounding.
    """
    vectors = vectors.where(vectors.abs() > TIE * vectors.abs().amax(-1, keepdim=True), 0)
    above, below = ((side > 0).double().mean(-1, keepdim=True) for side in (vectors, -vectors))
    first = vectors.gather(-1, (vectors != 0).int().argmax(-1, keepdim=True))
    is_open = (above <= 0.5) & (below <= 0.5) & (first > 0)
    return vectors.where(~is_open & ((above <= 0.5) | (above == 1)), -vectors)


def _quick(weights: Tensor, vectors: Tensor) -> Tensor:
    """weights @ vectors in single precision; symmetric weights, whose rows are quicker to use than their columns."""
    return (vectors.mT.float() @ weights).mT.double()


def _read(found: Ritz, degree: Tensor) -> Cut:
    """The cut that eigenvectors of D^-1/2 A D^-1/2 stand for."""
    import torch

    vector, values, residual = (found.vectors[..., 0] / degree.sqrt()), 1 - found.values, found.residuals[:, 0]
    third = values[:, 1] if values.shape[1] > 1 else torch.full_like(values[:, 0], 2)
    gap = (third - values[:, 0]).clamp(min=0)
    certified = _is_certain(vector, degree, residual, gap - found.residuals[:, :2][:, -1])
    return Cut(vector, values[:, 0], gap, residual, certified, degree)


def _is_certain(vector: Tensor, degree: Tensor, residual: Tensor, distance: Tensor) -> Tensor:
    """Whether it is certain on which side of the mean each node is, and which one is the seed: bool (B,).

    residual, distance: (B,), upper bound of the first, and lower bound of the distance to the other eigenvalues. Their
    ratio bounds the angle to the true vector (Davis and Kahan, SIAM J. Numer. Anal. 7, 1970); entries of y are then off
    by at most sqrt(2 / degree) times that.
    """
    error = (residual / distance)[:, None] * (2 / degree).sqrt()
    margin = (vector - vector.mean(1, keepdim=True)).abs()
    are_sides_certain = (margin > error + error.mean(1, keepdim=True)).all(1)
    size = vector.abs()
    largest, first = size.max(1, keepdim=True)
    is_open = (size - (1 - TIE) * largest).abs() <= error + error.gather(1, first)  # alike or not?
    return (distance > 0) & are_sides_certain & ~is_open.scatter(1, first, False).any(1)


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs, the largest eigenvalue first."""

    values: Tensor  # float64 (B, K)
    vectors: Tensor  # float64 (B, P, K), orthonormal
    residuals: Tensor  # float64 (B, K)

    def where(self, done: Tensor, other: Ritz) -> Ritz:
        """These in the graphs where `done`, the other ones elsewhere."""
        return Ritz(
            self.values.where(done[:, None], other.values),
            self.vectors.where(done[:, None, None], other.vectors),
            self.residuals.where(done[:, None], other.residuals),
        )


def _largest(
    product: Callable, start: Tensor, *, count: int, finished: Callable[[Ritz], Tensor], known: Tensor | None = None
) -> Ritz:
    """The largest eigenpairs of symmetric matrices of norm about 1, until `finished` says so for each: bool (B,).

    start: (B, P, b). known: (B, P, 1), an eigenvector of length 1 that is not looked for. count: at most what is left.
    A graph's answer is the one of the step that finished it, whatever other graphs need.
    """
    import torch

    known = start[..., :0] if known is None else known
    room = start.shape[1] - known.shape[2]  # directions that there are
    basis, images = start[..., :0], start[..., :0]  # (B, P, m)
    block, answer, done = _fresh(start[..., :room], known, seed=0), None, None
    for step in range(1, PRODUCTS + 1):
        image = product(block)
        basis, images = torch.cat([basis, block], 2), torch.cat([images, image], 2)
        if basis.shape[2] >= count:
            found, mix = _ritz(basis, images, count)
            answer = found if answer is None else answer.where(done, found)
            done = finished(answer)
            if done.all() or basis.shape[2] == room:
                break
        block = _fresh(image[..., : room - basis.shape[2]], torch.cat([known, basis], 2), seed=step)
        if basis.shape[2] >= BASIS + 2 * count:
            basis, images = (vectors @ mix[..., : BASIS // 2 + count] for vectors in (basis, images))
    return answer


def _ritz(basis: Tensor, images: Tensor, count: int) -> tuple[Ritz, Tensor]:
    """The best approximations within a basis, and the mixtures (B, m, m) of its vectors, the largest value first."""
    import torch

    projected = basis.mT @ images  # (B, m, m)
    small = ((projected + projected.mT) / 2).cpu()  # no work for a GPU
    values, mix = (found.flip(-1).to(basis.device) for found in torch.linalg.eigh(small))
    vectors = basis @ mix[..., :count]
    values = values[:, :count]
    residuals = (images @ mix[..., :count] - vectors * values[:, None]).norm(dim=1)
    return Ritz(values, vectors, residuals), mix


def _fresh(block: Tensor, basis: Tensor, seed: int) -> Tensor:
    """A block (B, P, b) made orthonormal, and orthogonal to a basis (B, P, m), m + b <= P.

    Where nothing but rounding is left of a column, an invariant subspace has been found. A random direction takes its
    place: there may be other subspaces beside it.
    """
    import torch

    def outside(vectors):
        return vectors - basis @ (basis.mT @ vectors)

    block = outside(torch.linalg.qr(outside(block)).Q)
    is_lost = block.norm(dim=1, keepdim=True) < 0.5  # of what had length 1: it was inside
    if is_lost.any():
        block = _random(block[..., 0], block.shape[2], seed + 1).where(is_lost, block)
        block = outside(torch.linalg.qr(outside(block)).Q)
    return torch.linalg.qr(block).Q


def _random(like: Tensor, columns: int, seed: int = 0) -> Tensor:
    """Random unit vectors, float64 (B, P, columns) for (B, P); the same ones for every graph and device."""
    import torch

    made = torch.randn(like.shape[1], columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (made / made.norm(dim=0)).to(like.device).expand(len(like), -1, -1)
