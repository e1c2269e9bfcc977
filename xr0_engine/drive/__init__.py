"""Robots to try the executor on, pictures of what it did, and the comparison of its modes."""
