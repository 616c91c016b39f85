"""The instructions on the RMP, one a file, checks in the order the processor makes them."""
