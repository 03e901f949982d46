"""Data: from documents to packed windows of tokens."""
