"""Tokenizers: training of vocabularies (BPE, SuperBPE), extension of those there are, and measures.

Functions take texts, not sources: `motifarch.data.texts` reads those. Encoding is done by
`tokenizers`, and what is written is an ordinary Hugging Face folder.
"""
