"""Fetches, checks and decodes media. The ingress and encoders use it."""
