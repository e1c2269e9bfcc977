"""Success rates of policies in simulation, at rest and under inference delay: `xr0 eval` (docs/evaluation.md)."""
