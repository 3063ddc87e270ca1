"""Text and scores from a Hugging Face folder: `motifarch generate` and `motifarch eval`."""
