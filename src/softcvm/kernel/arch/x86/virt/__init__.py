"""arch/x86/virt: what a host needs before any VM exists."""
