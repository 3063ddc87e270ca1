"""Model code that travels with a folder, for those who load it without motifarch.

`modeling_motif.py` is that code as it is written into folders: one readable file of PyTorch and
transformers that imports nothing of motifarch. It is simpler and slower than
`motifarch.models.motif`, and computes the same.
"""

from .folder import CODE_FILE, add_code

__all__ = ["CODE_FILE", "add_code"]
