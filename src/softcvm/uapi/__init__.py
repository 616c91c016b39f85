"""uapi: what user space reaches through file descriptors, one kind per file."""
