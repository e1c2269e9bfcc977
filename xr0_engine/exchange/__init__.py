"""Checkpoints of the released code: theirs to ours, and ours to theirs."""
