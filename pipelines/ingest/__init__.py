"""Write datasets as shards, and check them."""
