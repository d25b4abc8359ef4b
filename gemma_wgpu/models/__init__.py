"""Model families: each has one file with its configuration, its tensor table and its forward pass."""
