"""What faults do to a run: kills at random times, damaged files, a hostile checkpoint."""
