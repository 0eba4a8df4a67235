"""What happens in a layer's heads: masks, supports, features, and gradients through all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.layers import (
    Association,
    Hopfield,
    RandomFeatures,
    RandomRows,
    TopK,
    Window,
)
from service.core.heads import Memory, Support
from service.core.names import Entmax, KSubsets, Polynomial, Separation, Similarity

seeds = st.integers(0, 2**32 - 1)
SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", "max", "normmax", "lsr", Entmax(1.5), Entmax(1.3), Entmax(3.0), Polynomial(3), KSubsets(2),
)  # fmt: skip
SMOOTH = tuple(kind for kind in SEPARATIONS if kind not in ("max", "lsr"))
SUPPORTS: tuple[Support, ...] = ("dense", TopK(rows=3), TopK(share=0.4), RandomRows(share=0.5), Window(3))

# A layer that projects nothing: recall from the patterns it is given.
PLAIN = {
    "stored_pattern_as_static": True,
    "state_pattern_as_static": True,
    "pattern_projection_as_static": True,
    "normalize_stored_pattern": False,
    "normalize_state_pattern": False,
    "normalize_pattern_projection": False,
    "disable_out_projection": True,
}


def associated(separation: Separation, support: Support = "dense", similarity: Similarity = "dot") -> Association:
    """An association under the similarity named, or one that the separation can have."""
    if separation == "lsr":
        similarity = "neg_l2"
    elif isinstance(separation, Polynomial) and similarity == "neg_l2":
        similarity = "cosine"
    return Association(separation, support, similarity)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- masks and supports ----


@given(
    seeds,
    st.sampled_from(SEPARATIONS),
    st.sampled_from(("dense", TopK(rows=3), TopK(share=0.4))),
    st.sampled_from(("dot", "cosine", "neg_l2")),
)
def test_padded_rows_have_no_influence(
    seed: int, separation: Separation, support: Support, similarity: Similarity
) -> None:
    torch.manual_seed(seed)
    # The mean of two rows is equally near to both: where a third is nearer still, which of them is the second of a
    # top-K chosen anew is rounding's. So separations of equal weights take no step.
    steps = 0 if isinstance(separation, KSubsets) or separation == "lsr" else 2
    layer = Hopfield(
        6, num_heads=2, update_steps_max=steps, association=associated(separation, support, similarity)
    ).double()
    stored, state = normal(seed, 2, 5, 6, dtype=torch.float64), normal(seed + 1, 2, 3, 6, dtype=torch.float64)
    padded = torch.cat([stored, 1e3 * normal(seed + 2, 2, 4, 6, dtype=torch.float64)], dim=1).requires_grad_()
    padding = torch.arange(9).expand(2, -1) >= 5
    out = layer((padded, state, padded), padding)
    torch.testing.assert_close(out, layer((stored, state, stored)))
    out.sum().backward()
    assert padded.grad.isfinite().all()
    assert (padded.grad[:, 5:] == 0).all()


@pytest.mark.parametrize("features", ["linear", RandomFeatures(32)])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_padded_rows_have_no_influence_on_features(features: str | RandomFeatures, similarity: Similarity) -> None:
    layer = Hopfield(
        6, num_heads=2, update_steps_max=2, association=Association(features=features, similarity=similarity)
    )
    stored, state = normal(0, 2, 5, 6), normal(1, 2, 3, 6)
    padded = torch.cat([stored, 1e3 * normal(2, 2, 4, 6)], dim=1)
    out = layer((padded, state, padded), torch.arange(9).expand(2, -1) >= 5)
    torch.testing.assert_close(out, layer((stored, state, stored)))


@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_state_without_rows_reads_out_nothing(separation: Separation, support: Support) -> None:
    """An empty bag in a batch: no NaN, neither forwards nor backwards, and the other bags as without it."""
    torch.manual_seed(0)
    x = normal(0, 2, 4, 6).requires_grad_()
    padding = torch.tensor([[False] * 4, [True] * 4])
    layer = Hopfield(6, update_steps_max=2, association=associated(separation, support))
    torch.nn.init.ones_(layer.out_projection.bias)
    torch.manual_seed(1)
    out = layer(x, padding)
    assert (out[1] == 1).all()
    if not isinstance(support, RandomRows):
        torch.testing.assert_close(out[:1], layer(x[:1]))
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in layer.parameters())


def test_features_without_rows_read_out_nothing() -> None:
    padding = torch.tensor([[False] * 4, [True] * 4])
    for features in ("linear", RandomFeatures(8)):
        layer = Hopfield(6, disable_out_projection=True, association=Association(features=features))
        x = normal(0, 2, 4, 6).requires_grad_()
        out = layer(x, padding)
        assert (out[1] == 0).all()
        out.sum().backward()
        assert x.grad.isfinite().all()


@given(seeds, st.sampled_from(SMOOTH), st.integers(1, 6))
def test_top_k_gives_the_best_rows_the_separation_of_their_own(seed: int, separation: Separation, k: int) -> None:
    x, cue = normal(seed, 1, 6, 4, dtype=torch.float64), normal(seed + 1, 1, 2, 4, dtype=torch.float64)
    layer = Hopfield(4, association=Association(separation, TopK(rows=k)), **PLAIN)
    p = layer.get_association_matrix((x, cue, x))[0, 0]
    for state in range(2):
        best = (x[0] @ cue[0, state]).topk(k).indices.sort().values
        own = Hopfield(4, association=Association(separation), **PLAIN)
        alone = own.get_association_matrix((x[:, best], cue[:, state : state + 1], x[:, best]))[0, 0, 0]
        torch.testing.assert_close(p[state, best], alone)
        assert p[state].count_nonzero() <= k


@given(seeds, st.sampled_from(SEPARATIONS), st.sampled_from((TopK(share=1.0), RandomRows(rows=50), Window(50))))
def test_a_support_of_all_rows_is_dense(seed: int, separation: Separation, support: Support) -> None:
    x = normal(seed, 2, 7, 4, dtype=torch.float64)
    layer = Hopfield(4, association=associated(separation, support), **PLAIN).double()
    dense = Hopfield(4, association=associated(separation), **PLAIN).double()
    torch.testing.assert_close(layer(x), dense(x))


@given(st.integers(1, 200), st.integers(1, 100))
def test_a_share_is_counted_in_rationals(rows: int, percent: int) -> None:
    kept = int(TopK(share=percent / 100).of(torch.tensor(rows)))
    assert kept == -(-rows * percent // 100)


@given(seeds, st.integers(2, 12), st.integers(1, 12), st.sampled_from(("dot", "neg_l2", "cosine")), st.booleans())
def test_a_window_is_dense_under_its_mask(
    seed: int, rows: int, width: int, similarity: Similarity, masked: bool
) -> None:
    x = normal(seed, 2, rows, 4, dtype=torch.float64)
    own = None
    if masked:
        own = normal(seed + 1, 4, rows, rows) > 0.5
    first = (torch.arange(rows) - width // 2).clamp(0, max(rows - width, 0))[:, None]
    outside = (torch.arange(rows) < first) | (torch.arange(rows) >= first + width)
    torch.manual_seed(seed)
    options = {"num_heads": 2, "hidden_size": 3, "update_steps_max": 2}
    windowed = Hopfield(4, association=Association("sparsemax", Window(width), similarity), **options).double()
    dense = Hopfield(4, association=Association("sparsemax", "dense", similarity), **options).double()
    dense.load_state_dict(windowed.state_dict())
    both = outside if own is None else outside | own
    torch.testing.assert_close(windowed(x, None, own), dense(x, None, both))
    torch.testing.assert_close(
        windowed.get_association_matrix(x, None, own), dense.get_association_matrix(x, None, both)
    )


def test_a_window_is_the_root_of_the_length_by_default() -> None:
    x = normal(0, 1, 50, 4)
    p = Hopfield(4, association=Association(support=Window()), **PLAIN).get_association_matrix(x)
    assert p[0, 0, 25].nonzero().flatten().tolist() == list(range(21, 29))


def test_random_rows_are_drawn_at_every_call_and_kept_for_its_steps() -> None:
    x = normal(0, 1, 40, 4)
    layer = Hopfield(4, association=Association(support=RandomRows(share=0.25)), **PLAIN).eval()
    first, second = layer.get_association_matrix(x), layer.get_association_matrix(x)
    assert (first.count_nonzero(dim=-1) == 10).all()
    assert not torch.equal(first > 0, second > 0)
    torch.manual_seed(3)
    again = layer.get_association_matrix(x)
    torch.manual_seed(3)
    stepped = Hopfield(
        4, update_steps_max=3, association=Association(support=RandomRows(share=0.25)), **PLAIN
    ).get_association_matrix(x)
    assert torch.equal(again > 0, stepped > 0)


def test_random_rows_are_equally_likely() -> None:
    torch.manual_seed(0)
    x = normal(0, 1, 8, 4)
    memory = Memory(Association(support=RandomRows(rows=2)), x[None], 2000, beta=1.0)
    taken = (memory.weights(normal(1, 1, 1, 2000, 4)) > 0).float().mean(dim=(0, 1, 2))
    assert (taken - 0.25).abs().amax() < 5 * math.sqrt(0.25 * 0.75 / 2000)


# ---- features ----


@given(seeds, st.sampled_from(("linear", RandomFeatures(16))), st.integers(0, 3))
def test_features_weigh_rows_by_products_of_features(seed: int, features: str | RandomFeatures, steps: int) -> None:
    """The definition, by a (states, rows) matrix that the layer itself never makes."""
    torch.manual_seed(seed)
    x, beta = normal(seed, 2, 6, 4), 0.8
    layer = Hopfield(4, scaling=beta, update_steps_max=steps, association=Association(features=features), **PLAIN)

    def phi(u: Tensor) -> Tensor:
        u = u * math.sqrt(beta)
        if features == "linear":
            return torch.nn.functional.elu(u) + 1
        return (u @ layer.projections.T - u.square().sum(-1, keepdim=True) / 2).exp()

    state = x
    for _ in range(steps + 1):
        products = phi(state) @ phi(x).mT
        p = products / products.sum(-1, keepdim=True)
        state = p @ x
    eps = {"rtol": 1e-3, "atol": 1e-3}  # at rest, within update_steps_eps
    torch.testing.assert_close(layer(x), state, **eps)
    torch.testing.assert_close(layer.get_association_matrix(x)[:, 0], p, **eps)


def test_random_features_approach_softmax() -> None:
    """The errors are of the size that the variance of independent draws foretells; orthogonal ones are better."""
    torch.manual_seed(0)
    x = 0.5 * normal(0, 1, 12, 4)
    softmax = Hopfield(4, **PLAIN).get_association_matrix(x)
    errors = []
    for count in (16, 4096):
        layer = Hopfield(4, association=Association(features=RandomFeatures(count)), **PLAIN)
        errors.append(float((layer.get_association_matrix(x) / softmax - 1).square().mean().sqrt()))
    spread = math.sqrt(float(((x[0][:, None] + x[0]).square().sum(-1).exp() - 1).mean()) / 4096)
    assert errors[1] < 2 * spread
    assert errors[1] < errors[0] / 4


def test_features_stay_finite_where_exponents_are_large() -> None:
    layer = Hopfield(4, scaling=100.0, association=Association(features=RandomFeatures(64)), **PLAIN)
    assert layer(100 * normal(0, 2, 5, 4)).isfinite().all()


# ---- gradients ----


@pytest.mark.parametrize("separation", SMOOTH)
@pytest.mark.parametrize(
    ("similarity", "support"),
    [("dot", "dense"), ("cosine", "dense"), ("neg_l2", "dense"), ("dot", TopK(rows=3)), ("dot", Window(3))],
)
def test_gradients_are_those_of_the_function(separation: Separation, similarity: Similarity, support: Support) -> None:
    x = normal(3, 1, 4, 3, dtype=torch.float64).requires_grad_()
    y = normal(4, 1, 4, 3, dtype=torch.float64).requires_grad_()
    association = associated(separation, support, similarity)
    layer = Hopfield(
        3, scaling=1.3, update_steps_max=2, update_steps_eps=0.0, association=association, **PLAIN
    ).double()
    assert torch.autograd.gradcheck(lambda a, b: layer((a, b, a)), (x, y))


@pytest.mark.parametrize("features", ["linear", RandomFeatures(5)])
def test_gradients_of_features(features: str | RandomFeatures) -> None:
    x = normal(3, 2, 4, 3, dtype=torch.float64).requires_grad_()
    options = {"num_heads": 3, "hidden_size": 2, "update_steps_max": 1, "update_steps_eps": 0.0}
    layer = Hopfield(3, association=Association(features=features), **options).double()
    assert torch.autograd.gradcheck(layer, (x,))


def test_gradients_of_the_kernel() -> None:
    association = Association(Entmax(1.4), similarity="cosine", kernel_size=2)
    layer = Hopfield(3, scaling=2.0, update_steps_max=2, update_steps_eps=0.0, association=association).double()
    x = normal(3, 1, 4, 3, dtype=torch.float64)

    def of_kernel(kernel: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"kernel": kernel}, (x,))

    assert torch.autograd.gradcheck(of_kernel, (layer.kernel.detach().requires_grad_(),))
