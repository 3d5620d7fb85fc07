"""Exceptions, one file per kind: role builders for modules that the general rules of roles.py do not read."""

from teleport_fast.discovery.families import contrastive, experts, latent, nested, relative_bias, speech

__all__ = ["contrastive", "experts", "latent", "nested", "relative_bias", "speech"]
