"""What a run has done, on one page: curves, texts, tokens, settings; several runs compared."""
