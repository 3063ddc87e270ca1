"""Pretraining: recipes, the loop, checkpoints, metrics and a run's record."""
