"""Exceptions, one file per kind: role builders for modules that the general rules of roles.py do not read."""
