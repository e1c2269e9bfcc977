"""A checkpoint in 8 bits: made, compared with the one that it was made of, and told (docs/quantization.md)."""
