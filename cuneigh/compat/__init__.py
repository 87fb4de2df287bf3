"""Other libraries' names for what cuneigh computes."""
