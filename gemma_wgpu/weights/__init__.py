"""Weights: reading, converting and writing checkpoints, and bringing them to the GPU."""
