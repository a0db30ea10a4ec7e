"""The credit pipeline: its contracts, its agents, and the assets that watch over its fairness."""
