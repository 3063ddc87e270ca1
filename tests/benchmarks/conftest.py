"""Benchmarks are run from the repository's root and not installed: tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
