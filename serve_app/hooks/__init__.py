"""What other programs load of ours: vLLM, PyTorch, Ray, Ray Serve's proxy. ``docs/seams.md`` says what is changed there."""
