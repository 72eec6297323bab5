"""Serve multimodal models as encode → prefill → decode on Ray Serve with vLLM."""
