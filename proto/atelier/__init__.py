"""The Atelier client: stubs, `Client` and the `atelier` command."""
