"""The names by which Serve configs know our policies: ``policy_function: serve_app.autoscaling:IngressPolicy``."""

from serve_app.scaling.policies import DecodePolicy, IngressPolicy, SharedGPUs, WorkPolicy

__all__ = ["DecodePolicy", "IngressPolicy", "SharedGPUs", "WorkPolicy"]
