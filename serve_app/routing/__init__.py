"""Calls of a stage over its Ray Serve handle, and which replica takes each."""
