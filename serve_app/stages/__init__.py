"""The engine replicas: a vLLM engine each, and the way of its outputs to the ingress."""
