"""The shard format: the manifest, the tar files, and the rows in them."""
