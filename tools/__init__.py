"""What is built and measured with, outside of the wheel."""
