"""The decoder: one definition for training and serving, its caches, and the mapping from checkpoints."""
