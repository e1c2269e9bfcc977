"""A checkpoint to the Hugging Face hub: what is pushed of a folder, its model card, the push. What `xr0 push` calls."""
