"""Corpora, tokenizers and resumable loaders."""
