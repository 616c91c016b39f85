"""virt/kvm: the generic part of KVM."""
