"""What wraps Transformer Engine, and computes on NVIDIA GPUs."""
