"""What exists, and never gets lost: bytes and names. Knows nothing of tensors or requests."""
