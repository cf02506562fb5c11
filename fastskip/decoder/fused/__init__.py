"""The decoder on fused operations: what runs on CUDA, eagerly or as graphs."""
