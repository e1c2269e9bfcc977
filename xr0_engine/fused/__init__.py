"""The GPU's way to run the network: fused ops, tactics, static buffers and CUDA graphs."""
