"""Launch tables: what is tried, and the script that measures and writes them."""
