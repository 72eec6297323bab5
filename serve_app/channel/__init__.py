"""Tokens from decode to ingress: one TCP connection per pair of replicas, one frame per engine step.

The call of a request says where its tokens are to go (``ReplyTo``), the decode replica connects there (``outlet.py``), and
the ingress listens (``inlet.py``). The call itself stays open over its Ray handle until the request has ended: queues,
limits, draining, cancellation and death are Ray Serve's.
"""
