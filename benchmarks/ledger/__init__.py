"""What a run's ledger costs."""
