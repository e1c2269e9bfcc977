"""What stands in a run's folder, by name, for whoever reads one without training: nothing is imported here."""

from __future__ import annotations

CONFIG_FILE = "config.json"
RUN_STATISTICS_FILE = "statistics.json"
BASE_FILE = "base.json"
"""The hash of the checkpoint that the run began with: what of it learns nothing is in none of the run's own."""
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
EXPORTED = "model"
