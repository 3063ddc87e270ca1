"""How alike a model's weights are to another's: whether it was trained from scratch, or is a copy,
fine-tuned, merged or disguised.
"""
