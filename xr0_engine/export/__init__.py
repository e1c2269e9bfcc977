"""Making exports: a checkpoint to ONNX graphs, graphs to engines, and the proof that they compute the same."""
