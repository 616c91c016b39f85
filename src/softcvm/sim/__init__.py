"""What any simulated machine needs and nothing of SEV: addresses, range maps, steps, choices, events."""
