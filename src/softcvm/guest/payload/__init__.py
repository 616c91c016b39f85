"""The guest in machine code that the built-in firmware carries: payload.S, assembled by tools/build_payload.py."""
