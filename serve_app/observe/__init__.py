"""What can be seen of a server from outside. Here: what its processes count, and how that reaches Ray's metrics port."""
