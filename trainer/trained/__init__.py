"""A finished checkpoint of any run: found, loaded, drawn from and measured."""
