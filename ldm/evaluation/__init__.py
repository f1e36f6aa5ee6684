"""Scores of a checkpoint: retrieval, likelihood, variances."""
