"""Traces, spans, metrics and status: what can be seen of a server from outside."""
