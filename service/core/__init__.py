"""The mathematics of recall: pure functions of tensors, batched over cues, the same on any device.

Notation follows the field: `stored` Ξ (rows ξ_μ), `state` x, inverse temperature `beta`, similarity K, separation
sep, `weights` p = sep(β K(Ξ, x)). Rules:
- Nothing here mutates an argument, reads a clock or draws an unseeded number.
- Scores, weights and energies are float32 or wider, whatever the patterns are stored in.
- `retrieve.retrieve` checks its arguments once, at the edge; the functions it is made of trust theirs.
"""
