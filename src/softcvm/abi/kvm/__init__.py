"""abi/kvm: the numbers and structures of the KVM user-space interface."""
