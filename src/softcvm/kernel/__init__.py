"""Linux as a host of confidential VMs, file by file where Linux has it."""
