"""arch/x86/kvm: KVM on x86."""
