"""Certificates: whether a step over the rows that take part is the step over all of them, and how far it may be."""

from __future__ import annotations

import torch

from service.app.comparison import SCORE_ERROR, Comparison
from service.app.recall_options import Resolved
from service.bank import Found, View
from service.core.certificate import softmax_bound, sparse_exact
from service.core.retrieve import Retrieval
from service.core.separation import separate
from service.core.similarity import overlaps
from service.core.support import top_k
from service.core.update import association

Certificate = tuple[bool, float | None]
"""Whether there is one, and the distance within which the settled state is of the dense one."""


def certify(
    by: Comparison, view: View, found: Found, settled: Retrieval, beta: float, options: Resolved
) -> list[Certificate]:
    """One a cue. A certificate belongs to a step whose rows an exact search chose at that step's state, over the blocks
    it scores.
    """
    none: Certificate = (False, None)
    batch = len(found.rows)
    if options.certify:
        # Every row at the last state, over all blocks; the cost of a dense step, which is what is asked for.
        stored, _ = by.matrix(view)
        every = overlaps(by.blocks, stored, settled.state)
        support = min(found.rows.shape[1], view.count)
        scored, chosen = (every, None) if support == view.count else top_k(every, support)
        weights = separate(options.separation, scored * beta)
        target = association(stored if chosen is None else stored[chosen], weights)
        applies, moved = [True] * batch, by.length(target - settled.state)
    elif found.exact:
        scored, applies = found.scores, (settled.steps == 1).tolist()
        moved = torch.zeros(batch)
    else:
        return [none] * batch
    norm_max = by.norm_max(view)
    score_error = SCORE_ERROR * (1.0 if by.blocks.similarity == "cosine" else norm_max**2)
    if by.kernels:  # rows are scaled by 1/‖Wû‖, and their rounding with them
        score_error *= max(1.0, view.norm_bound(by.kernels))
    if options.separation == "softmax":
        missed = softmax_bound(scored, view.count, beta, norm_max, score_error)[1]
        holds, distance = [True] * batch, (missed + moved).tolist()
    elif options.separation == "max":
        holds, distance = [True] * batch, moved.tolist()  # the first row is the first of all rows
    else:
        exact = sparse_exact(options.separation, scored, beta, view.count, score_error)
        holds, distance = exact.tolist(), moved.tolist()
    return [
        (True, away) if there and held else none for there, held, away in zip(applies, holds, distance, strict=True)
    ]
