"""What a run was made of and from, in hashes that others can check."""
