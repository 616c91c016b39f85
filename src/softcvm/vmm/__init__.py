"""A VMM in Python: launches a firmware image as QEMU does, on the Sys interface; sees abi and sim only."""
