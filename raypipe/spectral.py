"""Eigenvectors of graphs of patches: the one of a normalised cut, the smallest ones of a Laplacian, and their signs.

Torch tensors only, on any device, always a batch of B graphs of P nodes each. Both solvers are one: a block Lanczos
iteration, written as Rayleigh-Ritz on a basis that is kept orthonormal in double precision, with a residual test at
every step and thick restarts (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). The products with the P x P matrix
are in single precision: they are what it costs, and it is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4  # start vectors: an eigenvalue of this multiplicity is seen as such; a product with 4 costs about two with 1
BASIS = 64  # vectors kept before a restart, beyond twice those asked for
PRODUCTS = 300  # blocks multiplied at most; 5 to 15 is usual
ROWS = 256  # of a matrix, in double precision at a time
SINGLE, DOUBLE = 2e-7, 1e-14  # error of a product in each precision, relative to the matrix; measured: half of it
RESIDUAL = 1e-6  # of the second eigenvector (spec)
THIRD = 1e-3  # residual of the third, whose value alone counts; its error is about the square of that
TIE = 1e-6  # entries whose sizes differ by less than this share of the largest are alike (spec)


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
    2022), whose degrees are then exact counts. Its first solution, the constant, is known and kept out. Where rounding
    leaves something open, the iteration goes on with products in double precision, some rows at a time.
    """
    degree = (1 - eps) * weights.sum(2).double() + eps * weights.shape[2]
    start = _random(degree, BLOCK)
    cut, found = _cut(dense(weights), degree, eps, start=start, tolerance=1.5 * SINGLE, rounding=SINGLE)
    left = (~cut.certified).nonzero()[:, 0]
    if not len(left):
        return cut
    some = weights if len(left) == len(weights) else weights[left]
    options = {"start": found.vectors[left], "tolerance": 100 * DOUBLE, "rounding": DOUBLE}
    sharper, _ = _cut(partial(_sharp, some), degree[left], eps, **options)
    for field in fields(Cut):
        getattr(cut, field.name)[left] = getattr(sharper, field.name)
    return cut


def smallest_eigenpairs(
    product: Callable[[Tensor], Tensor], degree: Tensor, count: int, *, normalised: bool = True, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The smallest solutions of (D - W) y = lambda D y, or of (D - W) y = lambda y.

    product: W times float64 (B, P, any), W symmetric and not negative; it may compute in single precision, as that of
    `dense` does. degree: (B, P), positive. count: how many, at most P - 1. tolerance: of the residuals, relative to D.
    Returns eigenvalues float64 (B, K), ascending, at least 0, and vectors float64 (B, K, P) with y^T D y = 1, or y^T y
    = 1; signs as they come (see `minority_positive`). K = min(count, P - 1). The constant is the first of them.
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
        normal if normalised else shifted, start, count, lambda found: (found.residuals <= tolerance).all(1)
    )
    values = 1 - ritz.values if normalised else -ritz.values * largest[..., 0]
    vectors = ritz.vectors / root if normalised else ritz.vectors
    return values.clamp(min=0), vectors.mT


def dense(weights: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of `smallest_eigenpairs` for a matrix in memory, float32 (B, P, P)."""
    return lambda vectors: (vectors.mT.float() @ weights).mT.double()  # symmetric: rows are quicker than columns


def orient(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors turned so that their seed is above the mean: TokenCut's two halves (Wang et al., CVPR 2022).

    vector: (B, P). The seed is the entry of the largest size; of entries alike up to `TIE` the first. Returns the
    turned vector, the upper half bool (B, P), and the seed int64 (B,). An entry that equals the mean is in the half
    that has no seed before the turn, as the paper's code has it.
    """
    upper = vector > vector.mean(1, keepdim=True)
    size = vector.abs()
    seed = (size >= (1 - TIE) * size.amax(1, keepdim=True)).int().argmax(1)  # the first of equals
    turned = ~upper.gather(1, seed[:, None])  # (B, 1)
    return vector.where(~turned, -vector), upper ^ turned, seed


def minority_positive(vectors: Tensor) -> Tensor:
    """Eigenvectors (..., P), each negated where more than half, but not all, of its entries are above 0.

    So the object, which is smaller than its surroundings, is positive (Melas-Kyriazi et al., CVPR 2022).
    """
    share = (vectors > 0).double().mean(-1, keepdim=True)
    return vectors.where((share <= 0.5) | (share == 1), -vectors)


def _cut(rows: Callable, degree: Tensor, eps: float, *, start: Tensor, tolerance: float, rounding: float):
    """The cut by one iteration, and what it has found: (Cut, Ritz), the latter to start another with.

    rows: the product with the weights; its errors are `rounding` of the matrix.
    """
    import torch

    root = degree.sqrt()[..., None]  # (B, P, 1)

    def product(vectors):
        vectors = vectors / root
        return ((1 - eps) * rows(vectors) + eps * vectors.sum(1, keepdim=True)) / root

    def of_third(found: Ritz) -> Tensor:
        return found.residuals[:, :2][:, -1]  # there are two nodes at least

    def read(found: Ritz) -> Cut:
        vector, values = (found.vectors[..., :1] / root)[..., 0], 1 - found.values
        third = values[:, 1] if values.shape[1] > 1 else torch.full_like(values[:, 0], 2)
        gap, residual = (third - values[:, 0]).clamp(min=0), found.residuals[:, 0]
        certified = _is_certain(vector, degree, residual + rounding, gap - of_third(found) - rounding)
        return Cut(vector, values[:, 0], gap, residual, certified, degree)

    def finished(found: Ritz) -> Tensor:
        residual = found.residuals[:, 0]
        is_enough = (residual <= tolerance) | ((residual <= RESIDUAL) & read(found).certified)
        return is_enough & (of_third(found) <= THIRD)

    constant = root / root.norm(dim=1, keepdim=True)
    found = _largest(product, start, min(BLOCK, len(root[0]) - 1), finished, known=constant)
    return read(found), found


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


def _sharp(weights: Tensor, vectors: Tensor) -> Tensor:
    """weights @ vectors in double precision, without the weights in double precision."""
    import torch

    rows = vectors.mT.contiguous()
    return torch.cat([rows @ some.double().mT for some in weights.split(ROWS, dim=1)], 2).mT


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
    product: Callable, start: Tensor, count: int, finished: Callable[[Ritz], Tensor], known: Tensor | None = None
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
