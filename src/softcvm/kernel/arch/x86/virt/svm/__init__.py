"""arch/x86/virt/svm: the host side of SEV-SNP."""
