"""Detectors of what is unlike the stored: a score for each image's features, larger for the known.

The baselines as their papers define them, then RecLag's score, log S(v) = log Σ_μ exp(β ξ_μ·v), over an interaction
matrix in a feature space of a fixed norm.

Rules:
- A detector is fitted on training features alone and is a function from `Features` to scores.
- What is tuned is tuned by the caller; the defaults here are the papers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.papers.reclag_classifier import Features
from service.core.gate import follow, log_mass
from service.core.kernel import features as unit_features
from service.core.kernel import whitening

Detector = Callable[[Features], Tensor]

# RecLag's appendix D.
NORM = 10.0
PAPER_BETA = 5.0

# Of the within-class covariance's mean: units that never fire have no variance to divide by.
_RIDGE = 1e-4

# Cues compared with the stored at once: 500 × 20,000 products are 40 MB.
_AT_ONCE = 500


# ---- measures ----


def fpr_at(known: Float[Tensor, " n"], others: Float[Tensor, " m"], tpr: float = 0.95) -> float:
    """The share of the others that is accepted where the threshold accepts at least `tpr` of the known (FPR95)."""
    threshold = known.sort().values[int((1 - tpr) * len(known) + 1e-9)]
    return float((others >= threshold).double().mean())


def auroc(known: Float[Tensor, " n"], others: Float[Tensor, " m"]) -> float:
    """P(known > other) + ½ P(equal): the area under the ROC curve."""
    ordered, asked = known.double().sort().values, others.double().contiguous()
    under, upto = torch.searchsorted(ordered, asked), torch.searchsorted(ordered, asked, right=True)
    return 1.0 - float((under + upto).double().mean()) / (2 * len(known))


# ---- baselines ----


def msp(of: Features) -> Tensor:
    """The largest softmax probability (Hendrycks, Gimpel 2017)."""
    return of.logits.softmax(-1).amax(-1)


def energy(of: Features) -> Tensor:
    """log Σ exp(logits) (Liu et al. 2020, eq. 4 at T = 1, without its minus)."""
    return of.logits.logsumexp(-1)


def react(train: Features, head: torch.nn.Linear, percentile: float = 0.9) -> Detector:
    """Energy of features cut off at a percentile of all training activations (Sun, Guo, Li 2021: the 90th)."""
    # kthvalue, since torch.quantile takes at most 16 million values.
    values = train.hidden.flatten()
    cut = values.kthvalue(max(1, int(percentile * len(values)))).values
    return lambda of: torch.nn.functional.linear(of.hidden.clamp_max(cut), head.weight, head.bias).logsumexp(-1)


def mhe(train: Features, beta: float = 0.01) -> Detector:
    """log mean_μ exp(β ξ_μ·h) over the training features of the predicted class that were classified right (Zhang et
    al. 2023, eq. 9; their β is 0.01). A mean, not their sum: at this β a sum compares the classes' sizes first.
    """
    stored = [rows.hidden for rows in _by_class(_right(train))]
    return lambda of: _per_class(
        of, lambda hidden, label: log_mass(hidden @ stored[label].T, beta) - math.log(len(stored[label]))
    )


def she(train: Features) -> Detector:
    """The product with the mean pattern of the predicted class (Zhang et al. 2023, eq. 10)."""
    means = torch.stack([rows.hidden.mean(0) for rows in _by_class(_right(train))])
    return lambda of: (of.hidden * means[of.predicted]).sum(-1)


def mahalanobis(train: Features) -> Detector:
    """-min_c (h - m_c)ᵀ Σ⁻¹ (h - m_c), Σ the covariance within classes (Lee et al. 2018)."""
    classes = _by_class(train)
    means = torch.stack([rows.hidden.mean(0) for rows in classes])
    root = whitening(torch.cat([rows.hidden - rows.hidden.mean(0) for rows in classes]), _RIDGE)
    return lambda of: -torch.cdist(of.hidden @ root.T, means @ root.T).square().amin(-1)


def nearest(stored: Float[Tensor, "rows d"], space: Space, k: int) -> Detector:
    """The cosine with the k-th nearest stored pattern (Sun et al. 2022: -distance of normalised features)."""
    return lambda of: nearest_at(stored, space, (k,), of)[:, 0]


def nearest_at(
    stored: Float[Tensor, "rows d"], space: Space, ks: tuple[int, ...], of: Features
) -> Float[Tensor, "n ks"]:
    """For each k, the neighbours searched for once. Raises ValueError where a k is over the rows."""
    if max(ks) > len(stored):
        raise ValueError(f"the {max(ks)}-th nearest of {len(stored)} patterns")
    rows, places = space(stored).T, torch.tensor(ks) - 1
    parts = [(space(part) @ rows).topk(max(ks)).values[:, places] for part in torch.split(of.hidden, _AT_ONCE)]
    return torch.cat(parts) / NORM**2


# ---- RecLag ----


@dataclass(frozen=True, eq=False)
class Space:
    """Features on a sphere: x = norm · W(h - middle) / ‖W(h - middle)‖."""

    middle: Float[Tensor, " d"]
    weight: Float[Tensor, "r d"]

    def __call__(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        return NORM * unit_features(self.weight, hidden - self.middle)


def spaces(train: Features) -> dict[str, Space]:
    """As they are (the paper's); the training features' mean subtracted; that, and whitened within classes."""
    d = train.hidden.shape[1]
    identity, mean = torch.eye(d), train.hidden.mean(0)
    within = torch.cat([rows.hidden - rows.hidden.mean(0) for rows in _by_class(train)])
    return {
        "as they are": Space(torch.zeros(d), identity),
        "centred": Space(mean, identity),
        "whitened": Space(mean, whitening(within, _RIDGE)),
    }


def reclag(matrix: Float[Tensor, "memories r"], space: Space, beta: float) -> Detector:
    """log S(v) (RecLag, section 5.3): no step is taken."""
    return lambda of: reclag_at(matrix, space, (beta,), of)[:, 0]


def reclag_at(
    matrix: Float[Tensor, "memories r"], space: Space, betas: tuple[float, ...], of: Features
) -> Float[Tensor, "n betas"]:
    """log S(v) at each β, the products taken once."""
    parts = []
    for hidden in torch.split(of.hidden, _AT_ONCE):
        products = space(hidden) @ matrix.T
        parts.append(torch.stack([log_mass(products, beta) for beta in betas], dim=-1))
    return torch.cat(parts)


def reclag_path(matrix: Float[Tensor, "memories r"], space: Space, beta: float, steps: int) -> Detector:
    """min_t log S(v_t) over the states that the dynamics visits: the score when the verdict comes after iterating."""
    return lambda of: follow(matrix, space(of.hidden), beta, steps_max=steps).score


def per_class(matrices: list[Float[Tensor, "memories r"]], space: Space, beta: float) -> Detector:
    """log Σ_μ exp(β ξ_μ·v) over the predicted class's own matrix: what RecLag's published code scores, without a λ."""
    return lambda of: _per_class(of, lambda hidden, label: log_mass(space(hidden) @ matrices[label].T, beta))


def by_class(train: Features, space: Space) -> list[Float[Tensor, "rows r"]]:
    """The training features of each class, in the space."""
    return [space(rows.hidden) for rows in _by_class(train)]


def _right(train: Features) -> Features:
    return train.take(train.predicted == labels_of(train))


def _by_class(train: Features) -> list[Features]:
    labels = labels_of(train)
    return [train.take(labels == label) for label in range(train.logits.shape[1])]


def labels_of(train: Features) -> Int[Tensor, " n"]:
    """Raises ValueError where they are not known."""
    if train.labels is None:
        raise ValueError("training features come with their labels")
    return train.labels


def _per_class(of: Features, score: Callable[[Tensor, int], Tensor]) -> Tensor:
    scores, predicted = torch.empty(len(of), dtype=torch.float64), of.predicted
    for label in range(of.logits.shape[1]):
        chosen = predicted == label
        if chosen.any():
            scores[chosen] = torch.cat([score(part, label) for part in torch.split(of.hidden[chosen], _AT_ONCE)])
    return scores
