"""In the engine process: how embeddings and KV blocks move from engine to engine."""
