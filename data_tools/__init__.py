"""From LMDBs to webdataset shards, and looking at what is in them."""
