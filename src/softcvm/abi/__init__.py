"""Definitions only: registers, structures and numbers, each cited and checked for size."""
