"""mm/: physical pages, address spaces and how the kernel touches user memory."""
