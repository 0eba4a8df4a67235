"""Association of many states with many memories at once: what one Hopfield layer computes inside its heads.

Strategy: `retrieve` recalls one cue per batch entry from one memory and reports on it; a layer has a memory per batch
entry and head, many states in each, and wants gradients and nothing else. So the loop is written once more here, over
tensors (batch, heads, states, d), of the same parts: `separate`, the similarities, the feature maps, the same rest.
What is compared is prepared once (`Memory`); a step is a mean of its rows, Ξᵀ p, and so is the readout of other values.

Rules:
- Everything is differentiable as far as its separation is: not `max` and not `lsr`, whose weights do not vary.
- A row that takes no part has logit -∞, never 0. A state none of whose rows takes part, or whose separation abstains,
  stays where it is, and what is read out for it is 0.
- Random rows are drawn from torch's default generator at every call, in evaluation too, as the model is defined.
- Only linear and random features never hold a (states, rows) matrix, and a window holds one of (states, width).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.core.features import FEATURES_MAX, PositiveRandom, linear
from service.core.names import NAMES, Polynomial, Separation, Similarity, is_separation
from service.core.separation import separate
from service.core.support import window
from service.errors import InvalidRequest

# A kernel, or cosine, divides by a norm of at least this: an all-zero row stays zero, with a finite gradient.
_NORM_MIN = 1e-12


@dataclass(frozen=True)
class _Part:
    """So many rows, or such a share of those that take part, rounded up."""

    rows: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.share is None):
            raise InvalidRequest(f"{type(self).__name__} takes either rows or a share, not {self.rows}, {self.share}")
        if self.rows is not None and self.rows < 1:
            raise InvalidRequest(f"{type(self).__name__} keeps at least one row, not {self.rows}")
        if self.share is not None and not 0 < self.share <= 1:
            raise InvalidRequest(f"{type(self).__name__}'s share is over 0 and at most 1, not {self.share}")

    def of(self, count: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """How many of `count` rows."""
        if self.share is None:
            return torch.full_like(count, self.rows or 1)
        exact = Fraction(repr(float(self.share)))  # in rationals: .7 of 10 rows are 7, not 8
        return (count * exact.numerator + exact.denominator - 1).div(exact.denominator, rounding_mode="floor")


class TopK(_Part):
    """The best-scored rows of each state, chosen anew at every step (Hu et al., "Nonparametric Modern Hopfield
    Models", 2024, eq. 3.11; ties at the last place are broken, not all kept).
    """


class RandomRows(_Part):
    """Rows drawn for each state at every call and kept for its steps (the same paper's random masked model)."""


@dataclass(frozen=True)
class Window:
    """The rows of a sequence around each state's place in its own (the same paper's sliding window; `support.window`).

    width: None is √rows.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise InvalidRequest(f"a window is at least one row wide, not {self.width}")


Support = Literal["dense"] | TopK | RandomRows | Window


@dataclass(frozen=True)
class RandomFeatures:
    """Positive random features in place of softmax (FAVOR+, Choromanski et al., "Rethinking Attention with Performers",
    2021), `count` draws. Their relative variance is (exp(β‖x + ξ‖²) - 1) / count: for small β.
    """

    count: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.count <= FEATURES_MAX:
            raise InvalidRequest(f"random features number from 1 to {FEATURES_MAX}, not {self.count}")


Features = Literal["linear"] | RandomFeatures


@dataclass(frozen=True)
class Association:
    """How a head associates states with rows.

    separation: any of `separation`'s. support: "dense", `TopK`, `RandomRows` or `Window`.
    similarity: "dot" (as in attention), "cosine" or "neg_l2" (-‖ξ - x‖²).
    kernel_size: rows of a learned kernel W per head, compared by cosine in its image (Wu et al., "U-Hop", 2024).
    features: "linear" (elu + 1) or `RandomFeatures` instead of a separation of scores.

    Raises InvalidRequest, with what there is to choose from, for an unknown one or a combination that means nothing.
    """

    separation: Separation = "softmax"
    support: Support = "dense"
    similarity: Similarity = "dot"
    kernel_size: int | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        if not is_separation(self.separation):
            raise InvalidRequest(
                f"separation is {', '.join(NAMES)}, Entmax(α), Polynomial(degree) or KSubsets(k), "
                f"not {self.separation!r}"
            )
        if self.support != "dense" and not isinstance(self.support, TopK | RandomRows | Window):
            raise InvalidRequest(f"support is dense, TopK, RandomRows or Window, not {self.support!r}")
        if self.similarity not in get_args(Similarity):
            raise InvalidRequest(f"similarity is one of {', '.join(get_args(Similarity))}, not {self.similarity!r}")
        if self.separation == "lsr" and self.similarity != "neg_l2":
            raise InvalidRequest(f"lsr separates squared distances: similarity='neg_l2', not {self.similarity!r}")
        if isinstance(self.separation, Polynomial) and self.similarity == "neg_l2":
            raise InvalidRequest("neg_l2 is never positive, so a polynomial of it would abstain from every row")
        if self.kernel_size is not None and (self.similarity != "cosine" or self.kernel_size < 1):
            raise InvalidRequest("a kernel has at least one row and is compared by cosine: similarity='cosine'")
        if self.features is None:
            return
        if self.features != "linear" and not isinstance(self.features, RandomFeatures):
            raise InvalidRequest(f"features is linear or RandomFeatures, not {self.features!r}")
        if (self.separation, self.support) != ("softmax", "dense") or self.similarity == "neg_l2":
            raise InvalidRequest("features stand in for softmax over all rows, by dot or cosine")


class Memory:
    """The rows of every head, prepared for the states that will be compared with them."""

    def __init__(
        self,
        association: Association,
        stored: Float[Tensor, "batch heads rows d"],
        states: int,
        *,
        beta: float | Float[Tensor, "_ 1 1"] = 1.0,
        valid: Bool[Tensor, "batch _ _ rows"] | None = None,
        kernel: Float[Tensor, "heads r d"] | None = None,
        projections: Float[Tensor, "count _"] | None = None,
    ) -> None:
        """states: how many each head will bring. beta: one for all heads, or one each.
        valid: the rows that take part, one mask for all heads or one each, for all states or each (None: all).
        kernel: W of each head, if `association` has one. projections: ω, if it has random features.

        Raises InvalidRequest for features with a mask of each state's own.
        """
        rows, support = stored.shape[-2], association.support
        if association.features is not None and valid is not None and valid.shape[-2] != 1:
            raise InvalidRequest("features hold no (states, rows) matrix, so no state can have a mask of its own")
        self._association, self._beta, self._kernel, self._projections = association, beta, kernel, projections
        self._rows = self._unit(stored)
        self._image = self._imaged(self._rows)
        self._places = None
        if isinstance(support, Window):
            positions = torch.arange(states, device=stored.device) * rows // states
            self._places = window(positions, rows, support.width)
            if valid is not None:
                own = valid.expand(-1, -1, states, -1)
                valid = own.gather(-1, self._places.expand(*own.shape[:2], -1, -1))
        elif isinstance(support, RandomRows):
            draw = torch.rand(*stored.shape[:2], states, rows, device=stored.device)
            _, chosen, kept = _best(draw, support, valid)
            valid = torch.zeros_like(draw, dtype=torch.bool).scatter(-1, chosen, kept)
        self._valid = valid
        if association.features is not None:
            keys = self._log_features(self._rows)
            keys = keys if valid is None else keys.masked_fill(~valid.mT, -torch.inf)
            # Each feature is scaled by its largest value over the rows: no sum overflows or vanishes, and it cancels.
            scale = keys.detach().amax(-2, keepdim=True)
            self._scale = scale.masked_fill(scale == -torch.inf, 0.0)
            self._row_features = (keys - self._scale).exp()

    def settle(
        self, cue: Float[Tensor, "batch heads states d"], steps_max: int, eps: float
    ) -> Float[Tensor, "batch heads states d"]:
        """Each cue after at most `steps_max` steps x' = Ξᵀ p; at rest where ‖x' - x‖ ≤ eps ‖x'‖."""
        state = self._unit(cue)
        frozen: Tensor | None = None
        for _ in range(steps_max):
            whole, weighed = self._mean(state, self._rows)
            with torch.no_grad():
                rest = (_length(whole - state) <= eps * _length(whole)).squeeze(-1) | ~weighed
                frozen = rest if frozen is None else rest | frozen
            if frozen.all():
                break
            state = torch.where(frozen.unsqueeze(-1), state, whole)
        return state

    def readout(
        self,
        state: Float[Tensor, "batch heads states d"],
        values: Float[Tensor, "batch heads rows v"],
        dropout: float = 0.0,
    ) -> Float[Tensor, "batch heads states v"]:
        """Σ p_μ v_μ at each state; weights are dropped with probability `dropout`, and the others scaled up."""
        return self._mean(state, values, dropout)[0]

    def weights(self, state: Float[Tensor, "batch heads states d"]) -> Float[Tensor, "batch heads states rows"]:
        """p at each state, as a whole matrix whatever the support."""
        if self._association.features is not None:
            products = self._state_features(state) @ self._row_features.mT
            return _divided(products, products.sum(-1, keepdim=True))
        p = self._associations(state)
        if self._places is None:
            return p
        whole = p.new_zeros(*p.shape[:-1], self._rows.shape[-2])
        return whole.scatter(-1, self._places.expand_as(p), p)

    def _mean(
        self, state: Tensor, values: Tensor, dropout: float = 0.0
    ) -> tuple[Float[Tensor, "batch heads states v"], Bool[Tensor, "batch heads states"]]:
        """Σ p_μ v_μ, and where any row weighs anything."""
        if self._association.features is not None:
            query = self._state_features(state)
            mass = query @ self._row_features.sum(-2).unsqueeze(-1)
            return _divided(query @ (self._row_features.mT @ values), mass), mass.squeeze(-1) > 0
        p = self._associations(state)
        weighed = (p > 0).any(-1)
        p = torch.nn.functional.dropout(p, dropout).to(values.dtype)
        if self._places is None:
            return p @ values, weighed
        return (p.unsqueeze(-2) @ self._slid(values)).squeeze(-2), weighed

    def _associations(self, state: Tensor) -> Float[Tensor, "batch heads states kept"]:
        kind, support = self._association.separation, self._association.support
        z = self._scores(state) * self._beta
        valid = None if self._valid is None else self._valid.expand_as(z)
        if not isinstance(support, TopK):
            return separate(kind, z, valid)
        best, rows, kept = _best(z, support, valid)
        p = separate(kind, best, kept)
        return p.new_zeros(z.shape).scatter(-1, rows, p)

    def _scores(self, state: Tensor) -> Float[Tensor, "batch heads states kept"]:
        """K(ξ_μ, x) of all rows, or of each state's window."""
        if self._association.similarity == "neg_l2":
            if self._places is not None:
                return -(self._slid(self._rows) - state.unsqueeze(-2)).square().sum(-1)
            return -torch.cdist(state, self._rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        query = self._imaged(state)
        if self._places is not None:
            return (self._slid(self._image) @ query.unsqueeze(-1)).squeeze(-1)
        return query @ self._image.mT

    def _slid(self, rows: Float[Tensor, "batch heads rows v"]) -> Float[Tensor, "batch heads states width v"]:
        """The window of each state."""
        assert self._places is not None
        return rows[:, :, self._places]

    def _imaged(self, x: Tensor) -> Tensor:
        return x if self._kernel is None else x @ self._kernel.mT

    def _unit(self, x: Tensor) -> Tensor:
        """Unit under cosine; under a kernel ‖Wx‖ = 1, the row itself staying in the input space."""
        if self._association.similarity != "cosine":
            return x
        return x / _length(self._imaged(x)).clamp_min(_NORM_MIN)

    def _log_features(self, x: Float[Tensor, "batch heads some d"]) -> Float[Tensor, "batch heads some count"]:
        """log φ(√β x)."""
        x = self._imaged(x) * self._beta**0.5
        log_features = linear if self._projections is None else PositiveRandom(self._projections, 1.0)
        return log_features(x.flatten(0, 2)).view(*x.shape[:3], -1)

    def _state_features(self, x: Float[Tensor, "batch heads states d"]) -> Float[Tensor, "batch heads states count"]:
        """φ of states, up to a factor of each state's own, which cancels."""
        return torch.softmax(self._log_features(x) + self._scale, dim=-1)


def _best(
    z: Float[Tensor, "batch heads states rows"], part: _Part, valid: Bool[Tensor, "batch _ _ rows"] | None
) -> tuple[Tensor, Int[Tensor, "batch heads states kept"], Bool[Tensor, "batch heads states kept"]]:
    """The largest values of the valid rows, their rows, and which are kept: states may keep different numbers."""
    if valid is None:
        count = torch.tensor(z.shape[-1], device=z.device)
    else:
        z = z.masked_fill(~valid, -torch.inf)
        count = valid.sum(-1, keepdim=True)
    wanted = torch.minimum(part.of(count), count)
    values, rows = z.topk(max(int(wanted.max()), 1), dim=-1)
    return values, rows, (torch.arange(rows.shape[-1], device=z.device) < wanted).expand_as(rows)


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length


def _divided(x: Tensor, mass: Tensor) -> Tensor:
    """x / mass, 0 where there is no mass."""
    return torch.where(mass > 0, x / torch.where(mass > 0, mass, 1.0), 0.0)
