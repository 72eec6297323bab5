"""What crosses a handle or the channel between processes, and how a request is shaped for each stage."""
