"""Find and judge policies, using models through fastskip's public names only."""
