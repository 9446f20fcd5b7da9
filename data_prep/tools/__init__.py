"""Commands on corpora and on finished shards."""
