"""Who asked, in what order, how it ends: requests. Joins registry and compose."""
