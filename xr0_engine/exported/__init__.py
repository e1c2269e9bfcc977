"""What runs exported graphs and engines in place of a checkpoint; `xr0_engine.export` writes them."""
