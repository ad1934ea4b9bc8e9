"""A router, a kind of attention and a kind of feed-forward layer as a user would add them: one file each."""
