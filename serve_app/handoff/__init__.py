"""The types that cross a handle or the channel between processes, and the shape of a request for each stage."""
