"""Recall as a bounded fixed-point iteration: x ← x + step_size · (Ξᵀ sep(β K(Ξ, x)) - x) until it settles.

Strategy: a `_Point` is a state with everything known at it (scores, weights, energy). The loop makes the first point
from the cue, steps from point to point, and stops when every cue has settled or the steps are used up. One step is a
handful of batched tensor operations, and one look at the device to learn whether anything still moves.

Rules:
- The first point is scored on the cue's observed blocks alone; every later one on the whole state with all block
  weights.
- A cue has settled at x when ‖Ξᵀp - x‖ ≤ update_steps_eps · ‖Ξᵀp‖: relative, so that the scale of the patterns does
  not matter, and of the full step, so that a short step_size is not mistaken for rest. It then takes no further step,
  so what is returned is the point that was found to be fixed. A point scored on some of the blocks is never at rest:
  the next one is scored on others.
- A settled cue is frozen: its state and weights stay, its later energies are NaN. A cue without rows never moves, and
  one whose separation abstains (all weights 0) moves no further.
- Scores that differ by rounding alone are told apart by a β large enough, and a step that weighs them apart does so the
  more at the next. So where the best tie (equal keys, of which HEN's mixture is made), `ties` gives them one score, at
  every point at which they tie: the mixture stays one.
- With cosine the dynamics run on unit blocks: stored rows are unit, and the cue is made so. Values of a block that is
  not observed are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.core.energy import energy
from service.core.names import NAMES, Polynomial, Separation, Similarity, abstains, is_separation
from service.core.separation import separate
from service.core.similarity import MAGNITUDE_MAX, Blocks, normalise_rows, overlaps, scores, spread
from service.core.update import update
from service.errors import InvalidRequest, NothingObserved

# Recall settles in a few steps (Ramsauer et al. 2021, Theorem 4: usually one). A hundred shows any slow drift, and
# bounds what one request can ask for.
UPDATE_STEPS_MAX = 100

# β times a score stays inside float32 (see MAGNITUDE_MAX), and so does Ω / β in the energy. Raw values of 10^12 ask for
# a β of 10^-19.
BETA_MAX = 1e9
BETA_MIN = 1e-30


# What float rounding makes of equal scores, in units of its machine epsilon: of products over some thousand values of
# unit rows, or of distances as a share of themselves.
TIE_EPS = 16


class Outcome(IntEnum):
    """How the iteration ended for one cue."""

    CONVERGED = 0
    STEPS_EXHAUSTED = 1
    NO_STEPS = 2  # none were asked for (update_steps_max=0)
    NO_ROWS = 3  # no stored pattern took part
    ABSTAINED = 4  # the separation gave no stored pattern any weight at the state returned


@dataclass(frozen=True)
class Retrieval:
    """What recall reached. `steps` on the time axis is the number of steps that the slowest cue took.

    state: x after the last step; with cosine a mean of unit blocks.
    weights: sep(β K(Ξ, x)) at that state; all 0 for a cue without rows or an abstention. With update_steps_max=0, at
    the cue.
    energy: [0] of the cue on its observed blocks, [t] after step t on the whole state; NaN once a cue has settled or
    has no rows.
    steps: steps taken by each cue; outcome: an `Outcome` each.
    states, step_weights: x and the weights at every time, if traced.
    """

    state: Float[Tensor, "batch d"]
    weights: Float[Tensor, "batch rows"]
    energy: Float[Tensor, "batch times"]
    steps: Int[Tensor, " batch"]
    outcome: Int[Tensor, " batch"]
    states: Float[Tensor, "times batch d"] | None
    step_weights: Float[Tensor, "times batch rows"] | None


def retrieve(
    blocks: Blocks,
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"],
    state: Float[Tensor, "batch d"],
    *,
    beta: float | Float[Tensor, " batch"],
    separation: Separation = "softmax",
    observed: Bool[Tensor, "batch spaces"] | None = None,
    valid: Bool[Tensor, "batch rows"] | None = None,
    first_scores: Float[Tensor, "batch rows"] | None = None,
    step_size: float = 1.0,
    update_steps_max: int = 3,
    update_steps_eps: float = 1e-4,
    clamp_observed: bool = False,
    ties: bool = False,
    trace: bool = False,
) -> Retrieval:
    """Iterate each state towards a fixed point of the memory (Ramsauer et al. 2021, eq. 3; Wu et al., "U-Hop", 2024,
    section 2.4).

    stored: unit blocks for cosine, raw values otherwise; shared by the batch (dense) or gathered per cue (a top-K
    support, fixed for the recall).
    observed: the blocks that the cue fills (None: all); the first step scores these alone.
    valid: the rows that take part (None: all); rows that pad a short support do not.
    first_scores: K on the observed blocks, if a search has computed them; used instead of scoring the cue again.
    clamp_observed: the cue's own blocks keep their values.
    ties: scores within rounding of the best count as equal; to be asked for where the search's best two are.

    Raises InvalidRequest for shapes that do not fit, numbers out of range and a separation that does not fit the
    similarity, NothingObserved for a cue with no observed block.
    """
    _check_shapes(blocks, stored, state, beta=beta, observed=observed, valid=valid, first_scores=first_scores)
    _check_numbers(beta, step_size, update_steps_max, update_steps_eps)
    _check_separation(separation, blocks)
    _check_cue(blocks, state, observed)
    batch, rows = state.shape[0], stored.shape[-2]
    dynamics = _Dynamics(blocks, stored, beta, separation, valid, ties)

    x = normalise_rows(state, blocks).to(torch.promote_types(stored.dtype, torch.float32))
    clamped = None
    if observed is not None:
        seen = spread(observed, blocks)
        x = x.masked_fill(~seen, 0.0)
        clamped = seen if clamp_observed else None
    elif clamp_observed:
        clamped = torch.ones_like(x, dtype=torch.bool)

    without_rows = None if valid is None else ~valid.any(-1)
    if rows == 0 or (without_rows is not None and without_rows.all()):
        outcome = torch.full((batch,), Outcome.NO_ROWS, device=x.device)
        unknown = x.new_full((batch, 1), torch.nan)
        return Retrieval(
            x, x.new_zeros(batch, rows), unknown, torch.zeros_like(outcome), outcome, x[None] if trace else None,
            x.new_zeros(1, batch, rows) if trace else None,
        )  # fmt: skip

    first = scores(blocks, stored, x, observed) if first_scores is None else first_scores.to(x.dtype)
    point = dynamics.at(x, first, observed)
    frozen = without_rows  # the cues that no longer move; None where every cue does, and nothing needs masking
    energies = [point.energy if frozen is None else point.energy.masked_fill(frozen, torch.nan)]
    points = [point]
    steps = torch.zeros(batch, dtype=torch.int64, device=x.device)
    may_abstain = abstains(separation)
    for t in range(update_steps_max + 1):
        whole = update(stored, point.state, point.weights, clamped)
        settled = _at_rest(point.state, whole, update_steps_eps)
        if t == 0 and observed is not None:
            settled = settled & observed.all(-1)
        if may_abstain:
            settled = settled | ~point.weights.any(-1)
        if frozen is not None:
            settled = settled | frozen
        at_rest = int(settled.sum())
        frozen = settled if at_rest else None
        if at_rest == batch or t == update_steps_max:
            break
        moved = whole if step_size == 1.0 else torch.lerp(point.state, whole, step_size)
        reached = dynamics.at(moved, overlaps(blocks, stored, moved))
        if frozen is None:
            point = reached
            energies.append(point.energy)
            steps += 1
        else:
            point = point.where(frozen, reached)
            energies.append(point.energy.masked_fill(frozen, torch.nan))
            steps += ~frozen
        if trace:
            points.append(point)

    unfinished = Outcome.STEPS_EXHAUSTED if update_steps_max else Outcome.NO_STEPS
    outcome = torch.full((batch,), unfinished, device=x.device)
    if frozen is not None and update_steps_max:
        outcome = outcome.masked_fill(frozen, Outcome.CONVERGED)
    if may_abstain:
        outcome = outcome.masked_fill(~point.weights.any(-1), Outcome.ABSTAINED)
    if without_rows is not None:
        outcome = outcome.masked_fill(without_rows, Outcome.NO_ROWS)
    return Retrieval(
        state=point.state,
        weights=point.weights,
        energy=torch.stack(energies, dim=-1),
        steps=steps,
        outcome=outcome,
        states=torch.stack([point.state for point in points]) if trace else None,
        step_weights=torch.stack([point.weights for point in points]) if trace else None,
    )


@dataclass(frozen=True)
class _Point:
    """A state and what the dynamics know at it."""

    state: Float[Tensor, "batch d"]
    weights: Float[Tensor, "batch rows"]
    energy: Float[Tensor, " batch"]

    def where(self, chosen: Bool[Tensor, " batch"], other: _Point) -> _Point:
        """This point for the chosen cues, the other for the rest."""
        row = chosen.unsqueeze(-1)
        return _Point(
            torch.where(row, self.state, other.state),
            torch.where(row, self.weights, other.weights),
            torch.where(chosen, self.energy, other.energy),
        )


@dataclass(frozen=True)
class _Dynamics:
    """What stays the same from step to step."""

    blocks: Blocks
    stored: Tensor
    beta: float | Float[Tensor, " batch"]
    separation: Separation
    valid: Bool[Tensor, "batch rows"] | None
    ties: bool

    def at(
        self,
        state: Float[Tensor, "batch d"],
        state_scores: Float[Tensor, "batch rows"],
        observed: Bool[Tensor, "batch spaces"] | None = None,
    ) -> _Point:
        if self.ties:
            state_scores = self._tied(state_scores)
        scale = self.beta.unsqueeze(-1) if isinstance(self.beta, Tensor) else self.beta
        weights = separate(self.separation, state_scores * scale, self.valid)
        height = energy(self.blocks, state, state_scores, weights, self.beta, self.separation, observed)
        return _Point(state, weights, height)

    def _tied(self, scores: Float[Tensor, "batch rows"]) -> Float[Tensor, "batch rows"]:
        """Scores within rounding of the best raised to it."""
        taking_part = scores if self.valid is None else scores.masked_fill(~self.valid, -torch.inf)
        best = taking_part.amax(-1, keepdim=True)
        return torch.where(taking_part >= best - rounding_of(best, self.blocks.similarity), best, scores)


def rounding_of(best: Float[Tensor, "*batch"], similarity: Similarity) -> Float[Tensor, "*batch"]:
    """How far under the best score one may lie that is as good."""
    return TIE_EPS * torch.finfo(best.dtype).eps * (torch.ones_like(best) if similarity == "cosine" else best.abs())


def _at_rest(state: Float[Tensor, "batch d"], whole: Float[Tensor, "batch d"], eps: float) -> Bool[Tensor, " batch"]:
    """Whether a whole step from `state` leads nowhere."""
    residual: Tensor = torch.linalg.vector_norm(whole - state, dim=-1)
    size: Tensor = torch.linalg.vector_norm(whole, dim=-1)
    return residual <= eps * size


def _check_shapes(blocks: Blocks, stored: Tensor, state: Tensor, **others: float | Tensor | None) -> None:
    fits = (
        state.ndim == 2
        and stored.ndim in (2, 3)
        and state.shape[-1] == stored.shape[-1] == blocks.dimension
        and (stored.ndim == 2 or stored.shape[0] == state.shape[0])
    )
    if not fits:
        raise InvalidRequest(
            f"state {tuple(state.shape)} and stored {tuple(stored.shape)} do not fit blocks of {blocks.dimension}"
        )
    batch, rows = state.shape[0], stored.shape[-2]
    wanted = {
        "beta": (batch,),
        "observed": (batch, len(blocks.widths)),
        "valid": (batch, rows),
        "first_scores": (batch, rows),
    }
    for name, value in others.items():
        if isinstance(value, Tensor) and tuple(value.shape) != wanted[name]:
            raise InvalidRequest(f"{name} {tuple(value.shape)} should be {wanted[name]}")


def _check_numbers(beta: float | Tensor, step_size: float, update_steps_max: int, update_steps_eps: float) -> None:
    in_range = (
        bool(((beta >= BETA_MIN) & (beta <= BETA_MAX)).all())
        if isinstance(beta, Tensor)
        else BETA_MIN <= beta <= BETA_MAX
    )
    if not in_range:
        raise InvalidRequest(f"beta is positive, from {BETA_MIN:g} to {BETA_MAX:g}, not {beta}")
    if not 0 < step_size <= 1:
        raise InvalidRequest(f"step_size is over 0 and at most 1, not {step_size}")
    if not 0 <= update_steps_max <= UPDATE_STEPS_MAX:
        raise InvalidRequest(f"update_steps_max is from 0 to {UPDATE_STEPS_MAX}, not {update_steps_max}")
    if not (update_steps_eps >= 0 and math.isfinite(update_steps_eps)):
        raise InvalidRequest(f"update_steps_eps is at least 0, not {update_steps_eps}")


def _check_separation(separation: Separation, blocks: Blocks) -> None:
    if not is_separation(separation):
        known = ", ".join((*NAMES, "Entmax(alpha)", "Polynomial(degree)", "KSubsets(k)"))
        raise InvalidRequest(f"separation is one of {known}, not {separation!r}")
    if separation == "lsr" and blocks.similarity != "neg_l2":
        raise InvalidRequest(f"lsr separates squared distances, neg_l2, not {blocks.similarity}")
    if isinstance(separation, Polynomial) and blocks.similarity == "neg_l2":
        raise InvalidRequest("neg_l2 is never positive, so a polynomial of it would abstain from every cue")


def _check_cue(blocks: Blocks, state: Tensor, observed: Tensor | None) -> None:
    if observed is not None and not observed.any(-1).all():
        raise NothingObserved("every cue fills at least one block")
    if blocks.similarity != "cosine" and state.numel() and not state.abs().amax() <= MAGNITUDE_MAX:
        raise InvalidRequest(f"values compared by {blocks.similarity} are at most {MAGNITUDE_MAX:g} in size")
