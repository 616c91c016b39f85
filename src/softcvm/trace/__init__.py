"""Histories: reading back what a machine's events said (docs/trace-format.md)."""
