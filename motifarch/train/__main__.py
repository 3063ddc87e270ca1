"""``python -m motifarch.train RECIPE.yaml``, which torchrun starts once for each rank."""

import sys

from motifarch.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
