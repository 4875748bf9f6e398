"""MovieLens rating prediction with SparseAdamW; the entry point is ../train_movielens.py."""
