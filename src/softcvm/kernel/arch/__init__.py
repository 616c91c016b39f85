"""arch/: what depends on the processor."""
