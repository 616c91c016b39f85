"""Processors: how guest code runs, and when it leaves the guest."""
