"""arch/x86/kvm/svm: AMD's side of KVM, as far as encrypted guests go."""
