"""Pretraining of text-to-image latent diffusion models.

Entries are `ldm/train.py`, `ldm/sample.py` and `ldm/evaluate.py`; README.md walks through the rooms.
"""
