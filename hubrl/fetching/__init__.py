"""What ``hubrl hubs fetch`` is made of: recipes, wheels, libraries' weights, conversions."""
