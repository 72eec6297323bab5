"""What other programs load of ours: vLLM, PyTorch, Ray Serve's proxy."""
