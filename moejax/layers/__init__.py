"""Sublayers of the residual stack: modules that hold parameters and call `moejax.ops`."""
