"""Tokens from decode to ingress: one TCP connection per pair of replicas, one frame per engine step.

The call of a request says where its tokens are to go (``ReplyTo``), the decode replica connects there (``outlet.py``), and
the ingress listens (``inlet.py``). The call stays open over its Ray handle until the request has ended, so that queues,
limits, draining, cancellation and death stay Ray Serve's.
"""
