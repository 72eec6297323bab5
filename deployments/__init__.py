"""The Ray Serve deployments: encoder, prefill, decode and ingress, one module each."""
