"""Datasets: formats, mixtures, a sharded stream that resumes exactly (docs/data.md)."""
