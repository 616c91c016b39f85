"""drivers: the parts of Linux that talk to devices; here the AMD-SP."""
