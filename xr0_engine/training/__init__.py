"""The trainer: recipes, the loop, losses, checkpoints that the engine loads (docs/training.md)."""
