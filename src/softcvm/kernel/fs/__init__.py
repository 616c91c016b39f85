"""fs/: struct file and the table of file descriptors."""
