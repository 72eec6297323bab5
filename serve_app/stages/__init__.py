"""The engine replicas: a vLLM engine per replica, and what it puts out on its way to the ingress."""
