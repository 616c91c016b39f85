"""What runs inside a guest: scripted programs, the GHCB client they use, and a built-in firmware image."""
