"""Dataset formats other than GNM folders. Each module ends with FORMAT = Format(...)."""
