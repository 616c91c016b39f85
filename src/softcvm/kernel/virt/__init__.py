"""virt/: what KVM shares between architectures."""
