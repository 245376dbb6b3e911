"""How fast images become bands, and whether training ever waits for them."""
