"""What one step is made of: its ops, their bounds, memory, tactics and compiled kernels."""
