"""What adapters do together: tensors. Knows nothing of the catalog or of requests."""
