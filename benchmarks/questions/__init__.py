"""What people who choose between one engine, more engines, the reference and this ask, and how it is measured."""
