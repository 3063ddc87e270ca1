"""What runs the operations: one folder for each backend."""
