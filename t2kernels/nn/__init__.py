"""Layers: parameters and one call each; the routing that the layers of a model share."""

from .linear import SVFLinear as SVFLinear
