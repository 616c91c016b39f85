"""drivers/crypto."""
