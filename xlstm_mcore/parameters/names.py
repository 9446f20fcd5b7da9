"""Global names of the parameters that more than one module spells.

Every layer and mixer makes the names of its own parameters from its prefix.
"""

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
OUTPUT = "output_layer.weight"
