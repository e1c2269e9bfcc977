"""What is timed as a whole: latency and its rivals, throughput, cold start, jitter, images, ablation."""
