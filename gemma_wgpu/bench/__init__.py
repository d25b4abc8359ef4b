"""Measurements: how fast a model is, where the time goes, and how well it predicts a text."""
