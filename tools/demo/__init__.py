"""The demo model: its training, and how often it is right."""
