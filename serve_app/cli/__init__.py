"""The commands of ``python -m serve_app``."""
