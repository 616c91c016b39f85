"""drivers/crypto/ccp: the driver of the AMD Secure Processor."""
