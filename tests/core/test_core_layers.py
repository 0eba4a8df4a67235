"""Hopfield layers: attention and recall as special cases, training, and what each argument does."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.layers import (
    Association,
    Entmax,
    Hopfield,
    HopfieldLayer,
    HopfieldPooling,
    KSubsets,
    Polynomial,
    RandomFeatures,
    RandomRows,
    TopK,
    Window,
    separation_loss,
)
from service.core.names import Separation, Similarity
from service.core.retrieve import UPDATE_STEPS_MAX, retrieve
from service.core.similarity import Blocks, Kernel, normalise_rows
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)
SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", "max", "normmax", "lsr", Entmax(1.5), Entmax(1.3), Entmax(3.0), Polynomial(3), KSubsets(2),
)  # fmt: skip
SMOOTH = tuple(kind for kind in SEPARATIONS if kind not in ("max", "lsr"))

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


def associated(separation: Separation, similarity: Similarity = "dot") -> Association:
    """An association under the similarity named, or one that the separation can have."""
    if separation == "lsr":
        similarity = "neg_l2"
    elif isinstance(separation, Polynomial) and similarity == "neg_l2":
        similarity = "cosine"
    return Association(separation, similarity=similarity)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As in production: the run-time shape checks of the tests would refuse a wrong shape before the layer can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- what is already known ----


@given(seeds, st.integers(1, 3), st.booleans(), st.booleans())
def test_softmax_in_one_step_is_attention(seed: int, heads: int, masked: bool, bias: bool) -> None:
    torch.manual_seed(seed)
    d, states, rows = 6 * heads, 4, 7
    attention = torch.nn.MultiheadAttention(d, heads, bias=bias, batch_first=True).double()
    layer = Hopfield(
        d, num_heads=heads, input_bias=bias, normalize_stored_pattern=False, normalize_state_pattern=False,
        normalize_pattern_projection=False,
    ).double()  # fmt: skip
    with torch.no_grad():
        three = (layer.state_projection, layer.stored_projection, layer.pattern_projection)
        for projection, weight in zip(three, attention.in_proj_weight.chunk(3), strict=True):
            projection.weight.copy_(weight)
        if bias:
            attention.in_proj_bias.normal_()
            for projection, value in zip(three, attention.in_proj_bias.chunk(3), strict=True):
                projection.bias.copy_(value)
            attention.out_proj.bias.normal_()
            layer.out_projection.bias.copy_(attention.out_proj.bias)
        layer.out_projection.weight.copy_(attention.out_proj.weight)
    stored, state = normal(seed, 2, rows, d, dtype=torch.float64), normal(seed + 1, 2, states, d, dtype=torch.float64)
    padding = association = None
    if masked:
        padding = torch.zeros(2, rows, dtype=torch.bool)
        padding[1, 5:] = True
        association = normal(seed + 2, 2 * heads, states, rows) > 0
        association[..., 0] = False  # attention has no answer for a state without rows
    want, weights = attention(
        state, stored, stored, key_padding_mask=padding, attn_mask=association, average_attn_weights=False
    )
    got = layer((stored, state, stored), padding, association)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.get_association_matrix((stored, state, stored), padding, association), weights)


@given(seeds, st.sampled_from(SEPARATIONS), st.sampled_from(("dot", "cosine", "neg_l2")), st.integers(0, 4))
def test_without_projections_it_is_retrieve(
    seed: int, separation: Separation, similarity: Similarity, steps: int
) -> None:
    """In every batch entry and head, with rows that take no part."""
    d, rows = 5, 6
    stored, cue = normal(seed, 2, rows, d, dtype=torch.float64), normal(seed + 1, 2, 3, d, dtype=torch.float64)
    padding = normal(seed + 2, 2, rows) > 1
    padding[:, 0] = False
    association = associated(separation, similarity)
    layer = Hopfield(d, scaling=1.7, update_steps_max=steps, association=association, **PLAIN).double()
    weights = layer.get_association_matrix((stored, cue, stored), padding)
    blocks = Blocks((d,), (1.0,), association.similarity)
    for entry in range(2):
        own = retrieve(
            blocks,
            normalise_rows(stored[entry], blocks),
            cue[entry],
            beta=1.7,
            separation=separation,
            valid=~padding[entry].expand(3, -1),
            update_steps_max=steps,
        )
        torch.testing.assert_close(weights[entry, 0], own.weights)
    torch.testing.assert_close(layer((stored, cue, stored), padding), (weights @ stored[:, None])[:, 0])


@given(seeds, st.integers(1, 7))
def test_under_a_kernel_it_is_retrieve_under_that_kernel(seed: int, rank: int) -> None:
    d = 5
    stored, cue = normal(seed, 1, 6, d, dtype=torch.float64), normal(seed + 1, 1, 3, d, dtype=torch.float64)
    association = Association(similarity="cosine", kernel_size=rank)
    layer = Hopfield(d, num_heads=2, hidden_size=d, scaling=4.0, update_steps_max=3, association=association, **PLAIN)
    layer = layer.double()
    with torch.no_grad():
        layer.kernel.copy_(normal(seed + 2, 2, rank, d, dtype=torch.float64))
    weights = layer.get_association_matrix((stored, cue, stored))
    features = layer.stored_features(stored)
    for head in range(2):
        blocks = Blocks((d,), (1.0,), "cosine", (Kernel(layer.kernel[head].detach()),))
        own = retrieve(blocks, normalise_rows(stored[0], blocks), cue[0], beta=4.0, update_steps_max=3)
        torch.testing.assert_close(weights[0, head], own.weights)
        image = stored[0] @ layer.kernel[head].T
        torch.testing.assert_close(features[0, head], image / image.norm(dim=-1, keepdim=True))


def test_a_whole_kernel_starts_as_cosine() -> None:
    x = normal(0, 2, 6, 8)
    with_kernel = Hopfield(8, association=Association(similarity="cosine", kernel_size=8), **PLAIN)
    cosine = Hopfield(8, association=Association(similarity="cosine"), **PLAIN)
    torch.testing.assert_close(with_kernel(x), cosine(x))


@pytest.mark.parametrize("separation", SMOOTH)
def test_enough_steps_reach_a_fixed_point(separation: Separation) -> None:
    stored = torch.nn.functional.normalize(normal(0, 1, 5, 4, dtype=torch.float64), dim=-1)
    cue = normal(1, 1, 8, 4, dtype=torch.float64)
    options = {**PLAIN, "scaling": 3.0, "association": Association(separation)}
    once = Hopfield(4, **options)
    settling = Hopfield(4, update_steps_max=None, update_steps_eps=1e-9, **options)
    reached = cue
    for _ in range(20):  # some cues take more steps than one call does
        reached = settling((stored, reached, stored))
    # Without projections one association is one step: at a fixed point it leads nowhere.
    torch.testing.assert_close(once((stored, reached, stored)), reached, rtol=0, atol=1e-7)
    assert not torch.allclose(once((stored, cue, stored)), reached, atol=1e-2)


def test_a_state_at_rest_costs_the_others_nothing() -> None:
    """Each state of a batch settles as it would alone."""
    stored = normal(0, 1, 6, 4)
    cues = torch.cat([stored[:, :1], normal(1, 1, 5, 4)], dim=1)
    layer = Hopfield(4, scaling=2.0, update_steps_max=20, association=Association(similarity="cosine"), **PLAIN)
    alone = torch.cat([layer((stored, cues[:, i : i + 1], stored)) for i in range(6)], dim=1)
    torch.testing.assert_close(layer((stored, cues, stored)), alone)


# ---- training ----


def fitted(model: torch.nn.Module, x: Tensor, target: Tensor) -> tuple[float, float]:
    """The squared error before and after some steps of Adam."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    errors = []
    for _ in range(100):
        error = (model(x) - target).square().mean()
        errors.append(float(error.detach()))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    return errors[0], errors[-1]


@pytest.mark.parametrize(
    "association",
    [
        Association(),
        Association("sparsemax", TopK(share=0.5)),
        Association(Entmax(1.2), similarity="cosine", kernel_size=4),
        Association(features=RandomFeatures(32)),
    ],
)
def test_trained_patterns_learn(association: Association) -> None:
    torch.manual_seed(0)
    lookup = HopfieldLayer(6, quantity=8, lookup_weights_as_separated=True, scaling=2.0, association=association)
    stored, targets = lookup.lookup_weights.detach().clone(), lookup.target_weights.detach().clone()
    before, after = fitted(lookup, normal(0, 4, 3, 6), normal(1, 4, 3, 6))
    assert after < 0.5 * before
    assert not torch.equal(stored, lookup.lookup_weights)
    assert not torch.equal(targets, lookup.target_weights)
    pooling = HopfieldPooling(6, quantity=2, num_heads=2, output_size=3, association=association)
    pooled = pooling.pooling_weights.detach().clone()
    before, after = fitted(pooling, normal(0, 4, 5, 6), normal(1, 4, 6))
    assert after < 0.5 * before
    assert not torch.equal(pooled, pooling.pooling_weights)


def test_patterns_that_are_not_trained_stay() -> None:
    lookup = HopfieldLayer(
        4, quantity=3, trainable=False, lookup_weights_as_separated=True, lookup_targets_as_trainable=False
    )
    stored, targets = lookup.lookup_weights.detach().clone(), lookup.target_weights.detach().clone()
    pooling = HopfieldPooling(4, trainable=False)
    pooled = pooling.pooling_weights.detach().clone()
    fitted(lookup, normal(0, 2, 3, 4), normal(1, 2, 3, 4))
    fitted(pooling, normal(0, 2, 3, 4), normal(1, 2, 4))
    assert torch.equal(stored, lookup.lookup_weights)
    assert torch.equal(targets, lookup.target_weights)
    assert torch.equal(pooled, pooling.pooling_weights)


def test_a_separation_loss_keeps_stored_patterns_apart() -> None:
    torch.manual_seed(0)
    patterns = torch.nn.functional.normalize(normal(0, 1, 1, 16) * 3 + normal(1, 1, 20, 16), dim=-1)
    association = Association(similarity="cosine", kernel_size=16)
    layer = Hopfield(16, scaling=10.0, association=association, **PLAIN)

    def own_weight() -> float:
        return float(layer.get_association_matrix(patterns)[0, 0].diagonal().mean())

    optimiser = torch.optim.Adam([layer.kernel], lr=0.02)
    before = own_weight()
    for _ in range(100):
        loss = separation_loss(layer.stored_features(patterns)[0, 0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert own_weight() > 2 * before


def test_dropout_acts_in_training_alone_and_keeps_the_mean() -> None:
    x = normal(0, 1, 6, 4).expand(4000, -1, -1)
    layer = Hopfield(4, dropout=0.5, **PLAIN)
    whole = layer.eval()(x)[0]
    assert torch.equal(whole, layer(x)[0])
    layer.train()
    torch.manual_seed(0)
    draws = layer(x)
    assert not torch.equal(draws[0], draws[1])
    assert ((draws.mean(0) - whole).abs() < 6 * draws.std(0) / math.sqrt(4000) + 1e-6).all()


# ---- as modules ----


@given(seeds, st.sampled_from(SEPARATIONS), st.integers(1, 3))
def test_pooling_does_not_see_the_order_of_rows(seed: int, separation: Separation, quantity: int) -> None:
    torch.manual_seed(seed)
    pooling = HopfieldPooling(
        6, quantity=quantity, num_heads=2, output_size=5, update_steps_max=1, association=associated(separation)
    ).double()
    x = normal(seed, 2, 7, 6, dtype=torch.float64)
    order = torch.randperm(7)
    out = pooling(x)
    assert out.shape == (2, quantity * 5)
    torch.testing.assert_close(pooling(x[:, order]), out)
    torch.testing.assert_close(
        pooling.get_association_matrix(x[:, order]), pooling.get_association_matrix(x)[..., order]
    )


@pytest.mark.parametrize(
    "association",
    [
        Association("sparsemax"),
        Association(similarity="cosine", kernel_size=5),
        Association(features=RandomFeatures(7)),
        Association(features="linear", similarity="cosine", kernel_size=5),
    ],
)
def test_a_state_dict_holds_everything_that_was_drawn(association: Association) -> None:
    x = normal(0, 2, 5, 6)
    for kind in (Hopfield, HopfieldPooling, HopfieldLayer):
        torch.manual_seed(0)
        one = kind(6, num_heads=2, association=association)
        torch.manual_seed(1)
        other = kind(6, num_heads=2, association=association)
        assert not torch.equal(one(x), other(x))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("kind", [Hopfield, HopfieldPooling, HopfieldLayer])
def test_sequences_may_come_length_first(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    x = normal(0, 2, 5, 6)
    padding = torch.arange(5).expand(2, -1) >= 3
    mask = {} if kind is HopfieldLayer else {"stored_pattern_padding_mask": padding}
    first = kind(6, num_heads=2, output_size=3)
    other = kind(6, num_heads=2, output_size=3, batch_first=False)
    other.load_state_dict(first.state_dict())
    want, got = first(x, **mask), other(x.transpose(0, 1), **mask)
    torch.testing.assert_close(got if kind is HopfieldPooling else got.transpose(0, 1), want)


def test_sizes_are_those_asked_for() -> None:
    layer = Hopfield(
        6, hidden_size=5, output_size=7, pattern_size=4, num_heads=3, stored_pattern_size=8, pattern_projection_size=9
    )
    out = layer((normal(0, 2, 4, 8), normal(1, 2, 3, 6), normal(2, 2, 4, 9)))
    assert out.shape == (2, 3, 7)
    assert {name: tuple(weight.shape) for name, weight in layer.named_parameters() if "projection" in name} == {
        "norm_pattern_projection.weight": (9,), "norm_pattern_projection.bias": (9,),
        "state_projection.weight": (15, 6), "state_projection.bias": (15,),
        "stored_projection.weight": (15, 8), "stored_projection.bias": (15,),
        "pattern_projection.weight": (12, 9), "pattern_projection.bias": (12,),
        "out_projection.weight": (7, 12), "out_projection.bias": (7,),
    }  # fmt: skip
    joined = Hopfield(6, num_heads=3, pattern_size=4, disable_out_projection=True, input_bias=False)
    assert joined(normal(0, 2, 4, 6)).shape == (2, 4, 12)
    assert all("projection.bias" not in name or "norm" in name for name, _ in joined.named_parameters())


def test_heads_may_have_a_beta_each() -> None:
    x = normal(0, 2, 5, 3)
    both = Hopfield(3, num_heads=2, hidden_size=3, scaling=torch.tensor([0.5, 4.0]), **PLAIN)
    for head, beta in enumerate((0.5, 4.0)):
        alone = Hopfield(3, scaling=beta, **PLAIN)
        torch.testing.assert_close(both.get_association_matrix(x)[:, head], alone.get_association_matrix(x)[:, 0])
    assert "scaling" not in both.state_dict()


def test_norms_come_where_they_are_asked_for() -> None:
    x = normal(0, 2, 5, 6)
    scaled, near = 7 * x + 3, {"rtol": 1e-3, "atol": 1e-3}  # a norm's eps counts more for x than for 7x
    layer = Hopfield(6, normalize_hopfield_space=True, **PLAIN)
    torch.testing.assert_close(layer.get_association_matrix(scaled), layer.get_association_matrix(x), **near)
    normed = Hopfield(6)
    torch.testing.assert_close(normed(scaled), normed(x), **near)
    bare = Hopfield(6, normalize_stored_pattern=False)
    assert not torch.allclose(bare(scaled), bare(x))


def test_half_precision_patterns_are_read_out_in_their_own() -> None:
    """Weights are of float32 and wider, whatever the patterns are held in."""
    x = normal(0, 2, 5, 6)
    layer = Hopfield(6, association=Association("sparsemax"), **PLAIN)
    got = layer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.float(), Hopfield(6, association=Association("sparsemax"), **PLAIN)(x), rtol=0, atol=0.1
    )


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"separation": "sparsmax"}, "softmax, sparsemax, max, normmax, lsr, Entmax"),
        ({"separation": []}, "separation is softmax"),
        ({"support": "topk"}, "dense, TopK, RandomRows or Window"),
        ({"similarity": "l2"}, "cosine, dot, neg_l2"),
        ({"separation": "lsr"}, "neg_l2"),
        ({"separation": Polynomial(3), "similarity": "neg_l2"}, "abstain"),
        ({"kernel_size": 4}, "cosine"),
        ({"kernel_size": 0, "similarity": "cosine"}, "at least one row"),
        ({"features": "performer"}, "linear or RandomFeatures"),
        ({"features": "linear", "separation": "sparsemax"}, "softmax over all rows"),
        ({"features": "linear", "support": TopK(rows=2)}, "softmax over all rows"),
        ({"features": "linear", "similarity": "neg_l2"}, "softmax over all rows"),
    ],
)
def test_an_unknown_choice_is_answered_with_what_there_is(options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Association(**options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_separation_in_place_of_an_association_is_told() -> None:
    with pytest.raises(InvalidRequest, match="Association\\(separation=…\\), not 'sparsemax'"):
        Hopfield(6, association="sparsemax")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(),
        lambda: TopK(rows=1, share=0.5),
        lambda: TopK(rows=0),
        lambda: RandomRows(share=0.0),
        lambda: RandomRows(share=1.5),
        lambda: Window(0),
        lambda: RandomFeatures(0),
        lambda: Hopfield(6, num_heads=4),
        lambda: Hopfield(0),
        lambda: Hopfield(6, pattern_size=0),
        lambda: Hopfield(6, scaling=0.0),
        lambda: Hopfield(6, scaling=torch.ones(3)),
        lambda: Hopfield(6, update_steps_max=UPDATE_STEPS_MAX + 1),
        lambda: Hopfield(6, update_steps_eps=-1.0),
        lambda: Hopfield(6, dropout=1.0),
        lambda: Hopfield(6, dropout=0.1, association=Association(features="linear")),
        lambda: Hopfield(6, hidden_size=4, state_pattern_as_static=True),
        lambda: Hopfield(6, stored_pattern_size=8, stored_pattern_as_static=True),
        lambda: Hopfield(6, pattern_size=4, pattern_projection_as_static=True),
        lambda: Hopfield(6, output_size=4, disable_out_projection=True),
        lambda: HopfieldPooling(6, quantity=0),
        lambda: HopfieldLayer(6, quantity=0),
        lambda: HopfieldLayer(6, pattern_projection_size=4),
        lambda: HopfieldLayer(6, lookup_targets_as_trainable=False),
        lambda: Hopfield(6).stored_features(torch.zeros(1, 2, 6)),
    ],
)
def test_what_means_nothing_is_refused(make: object) -> None:
    with pytest.raises(InvalidRequest):
        make()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("input", "padding", "mask"),
    [
        (torch.zeros(2, 5), None, None),
        (torch.zeros(2, 0, 6), None, None),
        (torch.zeros(2, 5, 4), None, None),
        ((torch.zeros(2, 5, 6), torch.zeros(3, 5, 6), torch.zeros(2, 5, 6)), None, None),
        ((torch.zeros(2, 5, 6), torch.zeros(2, 5, 6), torch.zeros(2, 4, 6)), None, None),
        (torch.zeros(2, 5, 6), torch.zeros(2, 4, dtype=torch.bool), None),
        (torch.zeros(2, 5, 6), torch.zeros(2, 5), None),
        (torch.zeros(2, 5, 6), None, torch.zeros(4, 5, dtype=torch.bool)),
        (torch.zeros(2, 5, 6), None, torch.zeros(2, 5, 5, dtype=torch.bool)),
        (torch.zeros(2, 5, 6), None, torch.zeros(5, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    input: Tensor | tuple[Tensor, ...], padding: Tensor | None, mask: Tensor | None
) -> None:
    with pytest.raises(InvalidRequest, match=r"\(\d"):
        Hopfield(6, num_heads=2)(input, padding, mask)


def test_features_take_one_mask_for_all_states() -> None:
    with pytest.raises(InvalidRequest, match="mask of its own"):
        Hopfield(6, association=Association(features="linear"))(
            torch.zeros(1, 5, 6), None, torch.zeros(5, 5, dtype=torch.bool)
        )


def test_importing_engram_does_not_import_torch() -> None:
    program = (
        "import sys, engram; assert 'torch' not in sys.modules; import engram.layers; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
