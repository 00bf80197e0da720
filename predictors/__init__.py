"""Learned scorers, the tokens that make up for removed patches, their losses and their training.

Stands on `patchrank`, under `export` and `eval`.
"""
