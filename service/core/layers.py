"""Hopfield layers: the dynamics as torch modules, for models that learn.

    Z = sep(β R W_Q (Y W_K)ᵀ) Y W_V        (Ramsauer et al., "Hopfield Networks is All You Need", 2021, eq. 10; with any
    other association, Hu et al., "Nonparametric Modern Hopfield Models", 2024, eq. D.2)

Strategy: `Hopfield` projects states R, stored patterns Y and what is read out for them into heads, lets the states
settle there (`heads.Memory`) and joins the heads. `HopfieldPooling` brings trained states, `HopfieldLayer` trained
stored patterns. Arguments are called as in ml-jku/hopfield-layers and mean the same; how states and rows are associated
is one value, an `Association`.

Rules:
- A mask is True at what takes no part.
- `update_steps_max` steps come before the readout, so 0 is attention.
- Projections start as torch.nn.MultiheadAttention's, a kernel W as a part of a rotation (so, whole, as cosine), trained
  patterns as N(0, 0.02²).
"""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from service.core.features import draw
from service.core.heads import Association, Memory, RandomFeatures
from service.core.retrieve import BETA_MAX, BETA_MIN, UPDATE_STEPS_MAX
from service.errors import InvalidRequest

_TRAINED_STD = 0.02


class Options(TypedDict, total=False):
    """What every layer takes beside `input_size`; see `Hopfield`."""

    hidden_size: int | None
    output_size: int | None
    pattern_size: int | None
    num_heads: int
    scaling: float | Tensor | None
    update_steps_max: int | None
    update_steps_eps: float
    association: Association
    stored_pattern_size: int | None
    pattern_projection_size: int | None
    stored_pattern_as_static: bool
    state_pattern_as_static: bool
    pattern_projection_as_static: bool
    normalize_stored_pattern: bool
    normalize_state_pattern: bool
    normalize_pattern_projection: bool
    normalize_hopfield_space: bool
    batch_first: bool
    dropout: float
    input_bias: bool
    disable_out_projection: bool


class Hopfield(nn.Module):
    """States associated with stored patterns; what is read out is a projection of a third sequence, or of the same one.

    input_size: values of a state pattern. stored_pattern_size, pattern_projection_size: of the others (None: as many).
    hidden_size: values per head in which they are associated (None: input_size / num_heads).
    pattern_size: values per head that are read out (None: hidden_size). output_size: None is input_size.
    scaling: β, one for all heads or a tensor of one each (None: 1/√hidden_size; 1 if nothing is projected).
    update_steps_max: steps before the readout (None: until rest, at most `retrieve.UPDATE_STEPS_MAX`).
    update_steps_eps: rest is ‖x' - x‖ ≤ eps ‖x'‖ of each state in each head.
    association: separation, support, similarity, kernel or features of the heads.
    …_as_static: not projected; every head takes the sequence as it is, so its values are hidden_size (of a pattern
    projection: any number).
    normalize_…: a layer norm before the projections; normalize_hopfield_space: after them, without weights of its own.
    batch_first: sequences are (batch, length, values), else (length, batch, values).
    dropout: of association weights at the readout. input_bias: of all projections.
    disable_out_projection: the heads side by side, num_heads · pattern_size values, are the output.

    Raises InvalidRequest for sizes and numbers out of range.
    """

    def __init__(
        self,
        input_size: int,
        *,
        hidden_size: int | None = None,
        output_size: int | None = None,
        pattern_size: int | None = None,
        num_heads: int = 1,
        scaling: float | Tensor | None = None,
        update_steps_max: int | None = 0,
        update_steps_eps: float = 1e-4,
        association: Association = Association(),
        stored_pattern_size: int | None = None,
        pattern_projection_size: int | None = None,
        stored_pattern_as_static: bool = False,
        state_pattern_as_static: bool = False,
        pattern_projection_as_static: bool = False,
        normalize_stored_pattern: bool = True,
        normalize_state_pattern: bool = True,
        normalize_pattern_projection: bool = True,
        normalize_hopfield_space: bool = False,
        batch_first: bool = True,
        dropout: float = 0.0,
        input_bias: bool = True,
        disable_out_projection: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(association, Association):
            raise InvalidRequest(f"association is an Association, as Association(separation=…), not {association!r}")
        if min(input_size, num_heads) < 1 or (hidden_size is None and input_size % num_heads):
            raise InvalidRequest(f"input_size {input_size} does not divide into {num_heads} heads: give hidden_size")
        self.input_size, self.num_heads = input_size, num_heads
        self.hidden_size = input_size // num_heads if hidden_size is None else hidden_size
        self.stored_pattern_size = input_size if stored_pattern_size is None else stored_pattern_size
        projected_size = input_size if pattern_projection_size is None else pattern_projection_size
        self.pattern_projection_size = projected_size
        if pattern_projection_as_static and pattern_size not in (None, projected_size):
            raise InvalidRequest(f"a static pattern projection is read out whole, {projected_size} values per head")
        self.pattern_size = projected_size if pattern_projection_as_static else self.hidden_size
        self.pattern_size = self.pattern_size if pattern_size is None else pattern_size
        joined = num_heads * self.pattern_size
        if disable_out_projection and output_size not in (None, joined):
            raise InvalidRequest(f"without an output projection the output is {joined} values, not {output_size}")
        self.output_size = joined if disable_out_projection else input_size if output_size is None else output_size
        sizes = (self.hidden_size, self.stored_pattern_size, projected_size, self.pattern_size, self.output_size)
        if min(sizes) < 1:
            raise InvalidRequest(f"sizes are at least 1, not {sizes}")
        static = {
            "state_pattern": (state_pattern_as_static, input_size),
            "stored_pattern": (stored_pattern_as_static, self.stored_pattern_size),
        }
        for name, (as_static, size) in static.items():
            if as_static and size != self.hidden_size:
                raise InvalidRequest(f"a static {name} has hidden_size={self.hidden_size} values, not {size}")

        self.update_steps_max = UPDATE_STEPS_MAX if update_steps_max is None else update_steps_max
        if not 0 <= self.update_steps_max <= UPDATE_STEPS_MAX:
            raise InvalidRequest(f"update_steps_max is from 0 to {UPDATE_STEPS_MAX} or None, not {update_steps_max}")
        if not (update_steps_eps >= 0 and math.isfinite(update_steps_eps)):
            raise InvalidRequest(f"update_steps_eps is at least 0, not {update_steps_eps}")
        if not 0 <= dropout < 1 or (dropout and association.features is not None):
            raise InvalidRequest(f"dropout is from 0 to under 1, and 0 where features hold no weights; not {dropout}")
        self.update_steps_eps, self.association, self.dropout = update_steps_eps, association, dropout
        self.batch_first = batch_first

        if scaling is None:
            untouched = stored_pattern_as_static and state_pattern_as_static and disable_out_projection
            scaling = 1.0 if untouched and pattern_projection_as_static else 1.0 / math.sqrt(self.hidden_size)
        betas = torch.as_tensor(scaling, dtype=torch.float64)
        if betas.shape not in ((), (num_heads,)) or not ((betas >= BETA_MIN) & (betas <= BETA_MAX)).all():
            raise InvalidRequest(
                f"scaling is one number from {BETA_MIN:g} to {BETA_MAX:g}, or {num_heads} of them, not {scaling}"
            )
        self.scaling: float | Tensor
        if isinstance(scaling, Tensor):
            self.register_buffer("scaling", scaling.reshape(-1, 1, 1), persistent=False)
        else:
            self.scaling = scaling

        def norm(size: int, wanted: bool) -> nn.Module:
            return nn.LayerNorm(size) if wanted else nn.Identity()

        def projection(size: int, per_head: int, as_static: bool) -> nn.Linear | None:
            return None if as_static else nn.Linear(size, num_heads * per_head, bias=input_bias)

        self.norm_state_pattern = norm(input_size, normalize_state_pattern)
        self.norm_stored_pattern = norm(self.stored_pattern_size, normalize_stored_pattern)
        self.norm_pattern_projection = norm(projected_size, normalize_pattern_projection)
        self.norm_hopfield_space = (
            nn.LayerNorm(self.hidden_size, elementwise_affine=False) if normalize_hopfield_space else nn.Identity()
        )
        self.state_projection = projection(input_size, self.hidden_size, state_pattern_as_static)
        self.stored_projection = projection(self.stored_pattern_size, self.hidden_size, stored_pattern_as_static)
        self.pattern_projection = projection(projected_size, self.pattern_size, pattern_projection_as_static)
        self.out_projection = None if disable_out_projection else nn.Linear(joined, self.output_size, bias=input_bias)
        compared = self.hidden_size
        self.kernel: nn.Parameter | None = None
        if association.kernel_size is not None:
            compared = association.kernel_size
            self.kernel = nn.Parameter(torch.empty(num_heads, compared, self.hidden_size))
        self.projections: Tensor | None
        drawn = association.features.count if isinstance(association.features, RandomFeatures) else None
        self.register_buffer("projections", None if drawn is None else torch.empty(drawn, compared))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters, and the random features, anew."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.kernel is not None:
            for weight in self.kernel:
                nn.init.orthogonal_(weight)
        if self.projections is not None:
            count, width = self.projections.shape
            self.projections.copy_(draw(count, width, torch.default_generator))

    def forward(
        self,
        input: Tensor | tuple[Tensor, Tensor, Tensor],
        stored_pattern_padding_mask: Bool[Tensor, "batch rows"] | None = None,
        association_mask: Bool[Tensor, "states rows"] | Bool[Tensor, "pairs states rows"] | None = None,
    ) -> Float[Tensor, "_ _ output"]:
        """What each state reads out: (batch, states, output_size), or (states, batch, output_size).

        input: one sequence that is all three, or (stored pattern, state pattern, pattern projection).
        Masks are True at what takes no part: a row for all states, or a row for a state (of each batch entry and head,
        head by head: pairs = batch · num_heads).
        Raises InvalidRequest for shapes that do not fit, naming them.
        """
        memory, cue, values = self._prepared(input, stored_pattern_padding_mask, association_mask)
        state = memory.settle(cue, self.update_steps_max, self.update_steps_eps)
        read = memory.readout(state, values, self.dropout if self.training else 0.0)
        joined = read.transpose(1, 2).flatten(2)
        out: Tensor = joined if self.out_projection is None else self.out_projection(joined)
        return out if self.batch_first else out.transpose(0, 1)

    @torch.no_grad()
    def get_association_matrix(
        self,
        input: Tensor | tuple[Tensor, Tensor, Tensor],
        stored_pattern_padding_mask: Bool[Tensor, "batch rows"] | None = None,
        association_mask: Bool[Tensor, "states rows"] | Bool[Tensor, "pairs states rows"] | None = None,
    ) -> Float[Tensor, "batch heads states rows"]:
        """The association weights of the readout, without gradient or dropout; arguments as `forward`'s."""
        memory, cue, _ = self._prepared(input, stored_pattern_padding_mask, association_mask)
        return memory.weights(memory.settle(cue, self.update_steps_max, self.update_steps_eps))

    def stored_features(self, stored_pattern: Float[Tensor, "_ _ d"]) -> Float[Tensor, "_ heads _ r"]:
        """Φ(ξ) = Wξ/‖Wξ‖ of the stored patterns in each head: what `kernel.separation_loss` keeps apart.

        Raises InvalidRequest for a layer without a kernel.
        """
        if self.kernel is None:
            raise InvalidRequest("the layer has no kernel: Association(similarity='cosine', kernel_size=…)")
        rows = self._heads(self._first(stored_pattern), self.norm_stored_pattern, self.stored_projection)
        return nn.functional.normalize(self.norm_hopfield_space(rows) @ self.kernel.mT, dim=-1)

    def _first(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(
        self, x: Float[Tensor, "batch length d"], norm: nn.Module, projection: nn.Linear | None
    ) -> Float[Tensor, "batch heads length v"]:
        x = norm(x)
        if projection is None:
            return x.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        projected: Tensor = projection(x)
        return projected.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _prepared(
        self, input: Tensor | tuple[Tensor, Tensor, Tensor], padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Memory, Tensor, Tensor]:
        """The memory, the cues and the values to read out, all in heads."""
        given = input if isinstance(input, tuple) else (input, input, input)
        stored, state, projected = (self._first(x) for x in given)
        sizes = (self.stored_pattern_size, self.input_size, self.pattern_projection_size)
        fits = all(
            x.ndim == 3 and x.shape[1] > 0 and x.shape[-1] == size
            for x, size in zip((stored, state, projected), sizes, strict=True)
        )
        if not fits or stored.shape[:2] != projected.shape[:2] or stored.shape[0] != state.shape[0]:
            raise InvalidRequest(
                f"stored, state and projected patterns {[tuple(x.shape) for x in given]} do not fit each other, are "
                f"empty, or are not of {sizes} values"
            )
        rows = self.norm_hopfield_space(self._heads(stored, self.norm_stored_pattern, self.stored_projection))
        cues = self.norm_hopfield_space(self._heads(state, self.norm_state_pattern, self.state_projection))
        values = self._heads(projected, self.norm_pattern_projection, self.pattern_projection)
        memory = Memory(
            self.association,
            rows,
            cues.shape[-2],
            beta=self.scaling,
            valid=self._valid(padding, mask, (*cues.shape[:3], rows.shape[-2])),
            kernel=self.kernel,
            projections=self.projections,
        )
        return memory, cues, values

    def _valid(
        self, padding: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]
    ) -> Bool[Tensor, "batch _ _ rows"] | None:
        """Both masks as one of the rows that take part."""
        batch, heads, states, rows = shape
        if padding is not None and (padding.dtype != torch.bool or padding.shape != (batch, rows)):
            raise InvalidRequest(
                f"stored_pattern_padding_mask is bool and {(batch, rows)}, not {padding.dtype} and "
                f"{tuple(padding.shape)}"
            )
        if mask is not None and (
            mask.dtype != torch.bool or mask.shape not in ((states, rows), (batch * heads, states, rows))
        ):
            raise InvalidRequest(
                f"association_mask is bool and {(states, rows)} or {(batch * heads, states, rows)}, "
                f"not {mask.dtype} and {tuple(mask.shape)}"
            )
        out = None if padding is None else padding[:, None, None, :]
        if mask is not None:
            own = mask.expand(batch, 1, -1, -1) if mask.ndim == 2 else mask.view(batch, heads, states, rows)
            out = own if out is None else own | out
        return None if out is None else ~out


class HopfieldPooling(nn.Module):
    """A sequence pooled into `quantity` vectors: `Hopfield` whose states are trained (Ramsauer et al. 2021, section 3).

    quantity: how many. trainable: whether they are trained. The rest is `Hopfield`'s.
    """

    def __init__(
        self, input_size: int, *, quantity: int = 1, trainable: bool = True, **options: Unpack[Options]
    ) -> None:
        super().__init__()
        if quantity < 1:
            raise InvalidRequest(f"at least one vector is pooled, not {quantity}")
        self.hopfield = Hopfield(input_size, **options)
        self.pooling_weights = nn.Parameter(torch.empty(1, quantity, input_size), requires_grad=trainable)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.hopfield.reset_parameters()
        nn.init.normal_(self.pooling_weights, std=_TRAINED_STD)

    def forward(
        self,
        input: Tensor | tuple[Tensor, Tensor],
        stored_pattern_padding_mask: Bool[Tensor, "batch rows"] | None = None,
        association_mask: Bool[Tensor, "quantity rows"] | Bool[Tensor, "pairs quantity rows"] | None = None,
    ) -> Float[Tensor, "batch pooled"]:
        """(batch, quantity · output_size). input: one sequence, or (stored pattern, pattern projection); masks as
        `Hopfield`'s.
        """
        pooled: Tensor = self.hopfield(self._triple(input), stored_pattern_padding_mask, association_mask)
        return (pooled if self.hopfield.batch_first else pooled.transpose(0, 1)).flatten(1)

    def get_association_matrix(
        self,
        input: Tensor | tuple[Tensor, Tensor],
        stored_pattern_padding_mask: Bool[Tensor, "batch rows"] | None = None,
        association_mask: Bool[Tensor, "quantity rows"] | Bool[Tensor, "pairs quantity rows"] | None = None,
    ) -> Float[Tensor, "batch heads quantity rows"]:
        """The weights that each row is pooled with, without gradient or dropout; arguments as `forward`'s."""
        return self.hopfield.get_association_matrix(self._triple(input), stored_pattern_padding_mask, association_mask)

    def _triple(self, input: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        stored, projected = input if isinstance(input, tuple) else (input, input)
        return stored, _repeated(self.pooling_weights, stored, self.hopfield.batch_first), projected


class HopfieldLayer(nn.Module):
    """States associated with `quantity` trained patterns: `Hopfield` as a lookup (Ramsauer et al. 2021, section 3).

    quantity: how many stored patterns. trainable: whether they are trained.
    lookup_weights_as_separated: what is read out has weights of its own, not those that are compared.
    lookup_targets_as_trainable: whether these are trained. The rest is `Hopfield`'s.
    """

    def __init__(
        self,
        input_size: int,
        *,
        quantity: int = 1,
        trainable: bool = True,
        lookup_weights_as_separated: bool = False,
        lookup_targets_as_trainable: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if quantity < 1:
            raise InvalidRequest(f"at least one pattern is stored, not {quantity}")
        self.hopfield = Hopfield(input_size, **options)
        stored, projected = self.hopfield.stored_pattern_size, self.hopfield.pattern_projection_size
        if not lookup_weights_as_separated and (stored != projected or not lookup_targets_as_trainable):
            raise InvalidRequest("read-out weights of another size or training: lookup_weights_as_separated=True")
        self.lookup_weights = nn.Parameter(torch.empty(1, quantity, stored), requires_grad=trainable)
        self.target_weights = (
            nn.Parameter(torch.empty(1, quantity, projected), requires_grad=lookup_targets_as_trainable)
            if lookup_weights_as_separated
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.hopfield.reset_parameters()
        nn.init.normal_(self.lookup_weights, std=_TRAINED_STD)
        if self.target_weights is not None:
            nn.init.normal_(self.target_weights, std=_TRAINED_STD)

    def forward(
        self,
        input: Float[Tensor, "_ _ d"],
        stored_pattern_padding_mask: Bool[Tensor, "batch quantity"] | None = None,
        association_mask: Bool[Tensor, "states quantity"] | Bool[Tensor, "pairs states quantity"] | None = None,
    ) -> Float[Tensor, "_ _ output"]:
        """What each state reads out; masks as `Hopfield`'s."""
        out: Tensor = self.hopfield(self._triple(input), stored_pattern_padding_mask, association_mask)
        return out

    def get_association_matrix(
        self,
        input: Float[Tensor, "_ _ d"],
        stored_pattern_padding_mask: Bool[Tensor, "batch quantity"] | None = None,
        association_mask: Bool[Tensor, "states quantity"] | Bool[Tensor, "pairs states quantity"] | None = None,
    ) -> Float[Tensor, "batch heads states quantity"]:
        """The association weights of the readout, without gradient or dropout; arguments as `forward`'s."""
        return self.hopfield.get_association_matrix(self._triple(input), stored_pattern_padding_mask, association_mask)

    def _triple(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stored = _repeated(self.lookup_weights, input, self.hopfield.batch_first)
        if self.target_weights is None:
            return stored, input, stored
        return stored, input, _repeated(self.target_weights, input, self.hopfield.batch_first)


def _repeated(trained: Float[Tensor, "1 quantity d"], like: Tensor, batch_first: bool) -> Tensor:
    """Trained patterns for every entry of a batch."""
    repeated = trained.expand(like.shape[0 if batch_first else 1], -1, -1)
    return repeated if batch_first else repeated.transpose(0, 1)
