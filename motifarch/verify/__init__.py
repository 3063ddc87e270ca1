"""Shows that a run's weights come from its seed, its data and its recipe, or where that fails."""
