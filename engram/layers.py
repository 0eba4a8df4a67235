"""Hopfield layers for models of your own.

    from engram.layers import Association, Hopfield, TopK

    layer = Hopfield(64, num_heads=4, association=Association(separation="sparsemax", support=TopK(share=0.2)))

This module imports torch; `import engram` does not.
"""

from service.core.heads import Association, RandomFeatures, RandomRows, TopK, Window
from service.core.kernel import separation_loss
from service.core.layers import Hopfield, HopfieldLayer, HopfieldPooling
from service.core.names import Entmax, KSubsets, Polynomial

__all__ = [
    "Association",
    "Entmax",
    "Hopfield",
    "HopfieldLayer",
    "HopfieldPooling",
    "KSubsets",
    "Polynomial",
    "RandomFeatures",
    "RandomRows",
    "TopK",
    "Window",
    "separation_loss",
]
