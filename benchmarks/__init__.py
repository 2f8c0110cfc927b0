"""Benchmarks: every claim of speed comes from here, side by side with the peer, as multiples of one plain gradient."""
