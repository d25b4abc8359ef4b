"""Model weights: reading checkpoints, and the layouts that the shaders read."""
